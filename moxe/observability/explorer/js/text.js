// The text: every token is an option of a list, shaded by the chosen measure.

const SHADES = 7;

// Where the shades begin and end, the same for all models of the page. Of 100 tokens 96 lie between the ends; one far
// out would make all others look alike.
function endsOf(models, name, layer) {
  if (MEASURES[name].range) return MEASURES[name].range;
  const values = models.filter((model) => hasMeasure(model, name)).flatMap((model) => valuesOf(model, name, layer));
  const known = d3.sort(values.filter((value) => value !== null));
  return [d3.quantile(known, 0.02) ?? 0, d3.quantile(known, 0.98) ?? 0];
}

function shadeOf(value, [low, high]) {
  if (value === null || !(high > low)) return 0;
  return Math.min(SHADES - 1, Math.max(0, Math.floor((SHADES * (value - low)) / (high - low))));
}

// `point`, `leave` and `focus` are told what happens to which token.
function makeText(parts, model, { point, leave, focus }) {
  const tokens = model.pieces.map((text, index) => {
    const shown = text === "" ? "·" : text.replaceAll("\n", "↵\n");
    return element("span", { role: "option", "aria-selected": "false", "data-token": index }, shown);
  });
  parts.text.append(...tokens);
  const indexOf = (event) => {
    const token = event.target.closest?.("[data-token]");
    return token ? Number(token.dataset.token) : null;
  };
  // Not "pointerover", which also comes where the text scrolls under a mouse that rests.
  parts.text.addEventListener("pointermove", (event) => {
    const index = indexOf(event);
    if (index !== null && event.pointerType === "mouse") point(index);
  });
  parts.text.addEventListener("pointerleave", leave);
  parts.text.addEventListener("click", (event) => {
    const index = indexOf(event);
    if (index !== null) tokens[index].focus();
  });
  parts.text.addEventListener("focusin", (event) => focus(indexOf(event)));
  arrowKeys(tokens, (index, key) => {
    if (key === "ArrowRight") return index + 1;
    if (key === "ArrowLeft") return index - 1;
    if (key === "Home") return 0;
    if (key === "End") return tokens.length - 1;
    if (key === "ArrowDown") return nearestInLine(tokens, index, 1);
    if (key === "ArrowUp") return nearestInLine(tokens, index, -1);
    return undefined;
  });
  return tokens;
}

// The token of the next line (or the one before) that is nearest to being above or below this one.
function nearestInLine(tokens, index, direction) {
  const place = (token) => token.getClientRects()[0] ?? token.getBoundingClientRect();
  const here = place(tokens[index]);
  let best;
  let line = null;
  for (let other = index + direction; tokens[other] !== undefined; other += direction) {
    const there = place(tokens[other]);
    if (Math.abs(there.top - here.top) < here.height / 2) continue;
    line ??= there.top;
    if (Math.abs(there.top - line) >= here.height / 2) break;
    const distance = Math.abs(there.left - here.left);
    if (best === undefined || distance < best.distance) best = { distance, other };
  }
  return best?.other ?? -1;
}

function shadeText(parts, model, tokens, { measure, layer }, ends) {
  const { label, unit = "", byLayer } = MEASURES[measure];
  if (!hasMeasure(model, measure)) {
    parts["key-title"].textContent = "The standard router of this model has no difficulty to shade by.";
    parts.key.replaceChildren();
    for (const token of tokens) {
      token.removeAttribute("class");
      token.removeAttribute("aria-label");
    }
    return;
  }
  const values = valuesOf(model, measure, layer);
  const step = (ends[1] - ends[0]) / SHADES;
  const digits = step > 0 ? Math.min(6, Math.max(2, -Math.floor(Math.log10(step)))) : 2; // that tell the shades apart
  tokens.forEach((token, index) => {
    token.className = `s${shadeOf(values[index], ends)}`;
    const value = values[index] === null ? "none" : decimal(values[index], digits) + unit;
    token.setAttribute("aria-label", `${spoken(model.pieces[index])}, ${label} ${value}`);
  });
  const where = byLayer ? `, ${layerLabel(layerIn(model, layer))}` : "";
  const isGroups = measure === "group_m";
  const colours = isGroups ? "blue: group M, orange: group S" : "the stronger the colour, the more";
  parts["key-title"].textContent = `Shaded by ${label}${where}; ${colours}.`;
  const bounds = d3.range(SHADES).map((shade) => decimal(ends[0] + shade * step, digits));
  const range = (shade) => {
    if (!(step > 0)) return shade === 0 ? `all ${bounds[0]}${unit}` : null;
    if (shade === 0) return `below ${bounds[1]}${unit}`;
    return shade === SHADES - 1 ? `from ${bounds[shade]}${unit}` : `from ${bounds[shade]}`;
  };
  const items = d3.range(SHADES).filter((shade) => range(shade) !== null);
  parts.key.replaceChildren(...items.map((shade) => element("li", { class: `s${shade}` }, range(shade))));
  parts.text.classList.toggle("groups", isGroups);
  parts.key.classList.toggle("groups", isGroups);
}

// So that what is chosen is seen also where it was chosen elsewhere; the page itself stays where it is.
function scrollTo(container, token) {
  const above = token.offsetTop - container.scrollTop;
  if (above < 0 || above + token.offsetHeight > container.clientHeight) {
    container.scrollTop = token.offsetTop - container.clientHeight / 2;
  }
}

// Marks the tokens of an expert, and returns which they are.
function lightText(parts, model, tokens, expert) {
  parts.text.classList.toggle("lit", expert !== null);
  const k = model.settings.num_experts_per_tok;
  const lit = new Set();
  if (expert !== null) {
    model.layers[expert.layer].experts.forEach((one, place) => {
      if (one === expert.expert) lit.add(Math.floor(place / k));
    });
  }
  tokens.forEach((token, index) => token.classList.toggle("lit", lit.has(index)));
  return lit;
}
