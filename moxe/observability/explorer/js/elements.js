// Elements of the page. Texts are always set as text, never as markup.

// An element with attributes and children; a child is an element, a text or null.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null));
  return made;
}

function option(value, label) {
  return element("option", { value }, label);
}

// A table with a header; each row is a list of cells, and a cell a text, an element or a list of them. `numbers` are the
// columns that are aligned as numbers, `chosen` is the row that is marked.
function table(caption, header, rows, { numbers = [], chosen = -1 } = {}) {
  const kind = (index) => (numbers.includes(index) ? "number" : null);
  const head = header.map((title, index) => element("th", { scope: "col", class: kind(index) }, title));
  const body = rows.map((cells, row) =>
    element(
      "tr",
      { class: row === chosen ? "chosen" : null },
      cells.map((cell, index) =>
        index === 0
          ? element("th", { scope: "row" }, cell)
          : element("td", { class: kind(index) }, cell),
      ),
    ),
  );
  return element(
    "table",
    {},
    caption === "" ? null : element("caption", {}, caption),
    element("thead", {}, element("tr", {}, head)),
    element("tbody", {}, body),
  );
}

function warning(text) {
  return element("p", { class: "warning" }, text);
}

// A token as a reader can tell it from others: white space is made visible.
function readable(text) {
  if (text === "") return "·";
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

function piece(text) {
  return element("code", { class: "piece" }, readable(text));
}

// The same for a screen reader.
function spoken(text) {
  if (text === "") return "part of a character";
  if (text.trim() !== "") return text.trim();
  return text.includes("\n") ? "line break" : "space";
}

function count(number) {
  return number.toLocaleString("en");
}

function decimal(number, digits = 2) {
  if (Math.abs(number) >= 1e5) return number.toExponential(1);
  return number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function percent(part, digits = 0) {
  const least = 10 ** -digits;
  return part > 0 && 100 * part < least / 2 ? `<${decimal(least, digits)}%` : `${decimal(100 * part, digits)}%`;
}

function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

// One tab stop for many items; the arrow keys go from one to the next. `step(index, key)` gives the index that a key
// leads to, one that is not there where the items end, and undefined where the key is not for us.
function arrowKeys(items, step) {
  let current = 0;
  const goTo = (index) => {
    items[current].tabIndex = -1;
    current = index;
    items[current].tabIndex = 0;
  };
  items.forEach((item, index) => {
    item.setAttribute("tabindex", index === 0 ? 0 : -1);
    item.addEventListener("focus", () => goTo(index));
    item.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const next = step(index, event.key);
      if (next === undefined) return;
      event.preventDefault(); // also at the end, or the page would scroll away
      items[next]?.focus();
    });
  });
}
