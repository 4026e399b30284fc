// The theory: log(P_M / P_S) = 2 gamma d where the raw logits are balanced; and the difficulty itself.

const MOST_DOTS = 1200;
const FITTED = "fitted slope";

const BINS = d3.range(0, 1.0001, 0.025);

// `models` are all of the page, which share the axes of a layer.
function showTheory(parts, model, models) {
  if (model.layers[0].difficulty === null) {
    parts["theory-note"].textContent = "The standard router of this model has no difficulty, so there is no slope to see.";
    return;
  }
  const law = model.settings.bias_kind === "standard" ? "2γd" : `the ${model.settings.bias_kind} bias of d`;
  const dots = model.pieces.length > MOST_DOTS ? `${count(MOST_DOTS)} of the tokens, evenly spread, are drawn. ` : "";
  parts["theory-note"].textContent =
    `If the raw logits leaned to neither group, log(P_M / P_S) would be ${law}, with γ = ${model.settings.gamma}. Dots are tokens; both ` +
    `lines pass through the mean of all. ${dots}Below: how many tokens have which difficulty. A slope has a 95% interval in brackets ` +
    "where the text is long enough for one (2,560 tokens).";
  parts["theory-table"].replaceChildren(slopes(model));
  parts.theory.replaceChildren(...model.layers.map((one, layer) => layerFigure(model, one, layer, axesOf(models, layer))));
}

function slopes(model) {
  const theory = model.settings.bias_kind === "standard" ? decimal(2 * model.settings.gamma) : `${decimal(2 * model.settings.gamma)} above d = ${model.settings.difficulty_threshold}`;
  const rows = model.layers.map((one, layer) => [
    `layer ${layer}`,
    one.odds_slope === null ? "none" : interval(one.odds_slope),
    theory,
    decimal(mean(one.difficulty), 3),
    one.difficulty_variance.toPrecision(2),
    { true: "collapsed", false: "tells tokens apart", null: "too short a text to say" }[one.is_collapsed],
  ]);
  const header = ["", "fitted slope", "2γ", "mean of d", "variance of d", "the difficulty"];
  return table("Slope of log(P_M / P_S) on d", header, rows, {
    numbers: [1, 2, 3, 4],
  });
}

function interval({ value, low, high }) {
  return low === null || high === null ? decimal(value) : `${decimal(value)} [${decimal(low)}, ${decimal(high)}]`;
}

// Ends of the log-odds and the fullest bin of the difficulty in a layer, over all models that have them.
function axesOf(models, layer) {
  const layers = models.map((model) => model.layers[layer]).filter((one) => one !== undefined && one.difficulty !== null);
  const bin = d3.bin().domain([0, 1]).thresholds(BINS.slice(1, -1));
  return {
    odds: d3.extent(layers.flatMap((one) => d3.extent(one.log_odds))),
    tokens: d3.max(layers, (one) => d3.max(bin(one.difficulty), (values) => values.length)),
  };
}

function layerFigure(model, one, layer, axes) {
  const all = d3.range(model.pieces.length);
  const drawn = all.filter((token) => Math.floor((token * MOST_DOTS) / all.length) !== Math.floor(((token - 1) * MOST_DOTS) / all.length));
  const points = (all.length > MOST_DOTS ? drawn : all).map((token) => ({
    d: one.difficulty[token],
    odds: one.log_odds[token],
  }));
  const [from, to] = d3.extent(one.difficulty);
  const centre = { d: mean(one.difficulty), odds: mean(one.log_odds) };
  const ofBias = mean(one.difficulty.map((d) => logOddsOfBias(model, d)));
  const theoryName = model.settings.bias_kind === "standard" ? "slope 2γ (dashed)" : "the bias (dashed)";
  const threshold = model.settings.difficulty_threshold;
  // Where the bias bends or jumps lies a point on each side.
  const bends = model.settings.bias_kind === "standard" || threshold < from || threshold >= to ? [] : [threshold, threshold + 1e-9];
  const theory = [from, ...bends, to].map((d) => ({
    d,
    odds: centre.odds + logOddsOfBias(model, d) - ofBias,
    line: theoryName,
  }));
  const fitted =
    one.odds_slope === null
      ? []
      : [from, to].map((d) => ({ d, odds: centre.odds + one.odds_slope.value * (d - centre.d), line: FITTED }));
  const odds = Plot.plot({
    style: CHART_STYLE,
    width: 320,
    height: 240,
    marginBottom: 46,
    x: { label: "difficulty d →", labelOffset: 38, domain: [0, 1] },
    y: { label: "↑ log(P_M / P_S)", domain: axes.odds, nice: true, grid: true },
    color: { legend: true, domain: [FITTED, theoryName], range: [colour("fit"), colour("theory")] },
    marks: [
      Plot.dot(points, { x: "d", y: "odds", r: 1.5, fill: colour("dot"), fillOpacity: 0.45 }),
      Plot.line(fitted, { x: "d", y: "odds", stroke: "line", strokeWidth: 2.5, clip: true }),
      Plot.line(theory, { x: "d", y: "odds", stroke: "line", strokeWidth: 2.5, strokeDasharray: "7 4", clip: true }),
    ],
  });
  const histogram = Plot.plot({
    style: CHART_STYLE,
    width: 320,
    height: 130,
    marginBottom: 46,
    x: { label: "difficulty d →", labelOffset: 38, domain: [0, 1] },
    y: { label: "↑ tokens", ticks: 3, domain: [0, axes.tokens] },
    marks: [Plot.rectY(one.difficulty, Plot.binX({ y: "count" }, { thresholds: BINS, fill: colour("dot") })), Plot.ruleY([0])],
  });
  describe(odds, `layer ${layer}: log-odds of group M against the difficulty; the slopes stand in the table`);
  describe(histogram, `layer ${layer}: histogram of the difficulty; mean and variance stand in the table`);
  const spread = `mean ${decimal(centre.d, 3)}, variance ${one.difficulty_variance.toPrecision(2)}`;
  return element(
    "figure",
    { "data-layer": layer },
    element("figcaption", {}, element("h4", {}, `Layer ${layer}`)),
    odds,
    element("p", { class: "note" }, `Difficulty of the tokens: ${spread}`),
    histogram,
    one.is_collapsed ? warning("The difficulty has collapsed here: it is nearly the same for all tokens.") : null,
  );
}

// A chart with a legend is a figure, whose last svg is the chart; the others are the colours of the legend.
function describe(chart, words) {
  const svg = chart.tagName === "svg" ? chart : [...chart.querySelectorAll("svg")].at(-1);
  for (const swatch of chart.querySelectorAll("svg")) swatch.setAttribute("aria-hidden", "true");
  svg.removeAttribute("aria-hidden");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", words);
}
