// The heat map of load: layers by experts; a cell chooses its expert.

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

const CHART_STYLE = { background: "transparent", fontSize: "12px", fontFamily: "system-ui, sans-serif" };

function loadLabel(model, { layer, expert, load }) {
  const fair = load * model.settings.num_experts;
  return `layer ${layer}, expert ${expertName(model, expert)}: ${percent(load, 1)} of the assignments, ` +
    `${decimal(fair)} times an equal share`;
}

// `models` are all of the page, which share the colours.
function showLoad(parts, model, models, choose) {
  const cells = model.layers.flatMap((one, layer) =>
    one.load.map((load, expert) => ({ layer, expert, load, name: expertName(model, expert) })),
  );
  const names = d3.range(model.settings.num_experts).map((expert) => expertName(model, expert));
  const half = groupSize(model);
  const most = d3.max(models, (one) => d3.max(one.layers, ({ load }) => d3.max(load)));
  const isWide = model.settings.num_experts <= 16;
  const room = parts.load.clientWidth - 65;
  const cell = Math.min(46, Math.max(isWide ? 29 : 26, room / (model.settings.num_experts + 1)));
  const chart = Plot.plot({
    style: CHART_STYLE,
    width: 65 + cell * (model.settings.num_experts + 1),
    height: 80 + 30 * model.layers.length,
    marginLeft: 45,
    marginBottom: 45,
    x: { domain: [...names.slice(0, half), " ", ...names.slice(half)] },
    y: { label: "layer", domain: d3.range(model.layers.length), tickSize: 0 },
    color: { type: "linear", domain: [0, most], range: [colour("page"), colour("heat")] },
    marks: [
      groupAxis(model, "M", names.slice(0, half)),
      groupAxis(model, "S", names.slice(half)),
      Plot.cell(cells, {
        x: "name",
        y: "layer",
        fill: "load",
        stroke: colour("line"),
        inset: 1,
        ariaLabel: (cell) => loadLabel(model, cell),
        title: (cell) => loadLabel(model, cell),
      }),
      isWide ? Plot.text(cells, { x: "name", y: "layer", text: ({ load }) => percent(load), fill: "currentColor", pointerEvents: "none" }) : null,
    ],
  });
  for (const drawn of chart.querySelectorAll(":scope > g")) {
    if (drawn.getAttribute("aria-label") !== "cell") drawn.setAttribute("aria-hidden", "true");
  }
  chart.setAttribute("role", "group");
  chart.setAttribute("aria-label", "load of every expert, a button each");
  const buttons = [...chart.querySelectorAll('g[aria-label="cell"] rect')];
  buttons.forEach((button, index) => {
    const { layer, expert } = cells[index];
    button.setAttribute("role", "button");
    button.addEventListener("click", () => choose({ layer, expert }));
    button.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose({ layer, expert });
    });
  });
  arrowKeys(buttons, (index, key) => {
    const { layer, expert } = cells[index];
    const at = (row, column) =>
      row in model.layers && column >= 0 && column < model.settings.num_experts ? row * model.settings.num_experts + column : -1;
    if (key === "ArrowRight") return at(layer, expert + 1);
    if (key === "ArrowLeft") return at(layer, expert - 1);
    if (key === "ArrowDown") return at(layer + 1, expert);
    if (key === "ArrowUp") return at(layer - 1, expert);
    return undefined;
  });
  parts["load-note"].textContent =
    `Share of the assignments of this text (${model.settings.num_experts_per_tok} a token) that each expert receives; an equal share is ` +
    `${percent(1 / model.settings.num_experts, 1)}. Group M: ${kindOf(model, "M")} experts, group S: ${kindOf(model, "S")} experts. ` +
    "Choose an expert to light up its tokens in the text.";
  parts.load.replaceChildren(chart);
  return { cells, buttons };
}

// The names of a group's experts in its colour, and below them what the group is.
function groupAxis(model, group, names) {
  const style = { color: colour(group.toLowerCase()), tickSize: 0, label: null };
  const middle = names[Math.floor((names.length - 1) / 2)];
  return [
    Plot.axisX(names, style),
    Plot.text([middle], {
      x: [middle],
      text: [`group ${group}: ${kindOf(model, group)}`],
      frameAnchor: "bottom",
      dy: 34,
      fill: style.color,
    }),
  ];
}

function markLoad({ cells, buttons }, chosen) {
  buttons.forEach((button, index) => {
    const { layer, expert } = cells[index];
    button.setAttribute("aria-pressed", String(chosen !== null && chosen.layer === layer && chosen.expert === expert));
  });
}
