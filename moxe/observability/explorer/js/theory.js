// The theory: log(P_M / P_S) = 2 gamma d where the raw logits are balanced; and the difficulty itself.

const MOST_DOTS = 1200;

function showTheory(parts, model) {
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
  parts.theory.replaceChildren(...model.layers.map((one, layer) => layerFigure(model, one, layer)));
}

function slopes(model) {
  const theory = model.settings.bias_kind === "standard" ? decimal(2 * model.settings.gamma) : `${decimal(2 * model.settings.gamma)} above d = ${model.settings.difficulty_threshold}`;
  const rows = model.layers.map((one, layer) => [
    `layer ${layer}`,
    one.odds_slope === null ? "none" : interval(one.odds_slope),
    theory,
    decimal(mean(one.difficulty), 3),
    one.difficulty_variance.toPrecision(2),
    one.is_collapsed ? "collapsed" : "tells tokens apart",
  ]);
  const header = ["", "fitted slope", "2γ", "mean of d", "variance of d", "the difficulty"];
  return table("Slope of log(P_M / P_S) on d", header, rows, {
    numbers: [1, 2, 3, 4],
  });
}

function interval({ value, low, high }) {
  return low === null || high === null ? decimal(value) : `${decimal(value)} [${decimal(low)}, ${decimal(high)}]`;
}

function layerFigure(model, one, layer) {
  const all = d3.range(model.pieces.length);
  const drawn = all.filter((token) => Math.floor((token * MOST_DOTS) / all.length) !== Math.floor(((token - 1) * MOST_DOTS) / all.length));
  const points = (all.length > MOST_DOTS ? drawn : all).map((token) => ({
    d: one.difficulty[token],
    odds: one.log_odds[token],
  }));
  const [from, to] = d3.extent(one.difficulty);
  const centre = { d: mean(one.difficulty), odds: mean(one.log_odds) };
  const ofBias = mean(one.difficulty.map((d) => logOddsOfBias(model, d)));
  const theoryName = model.settings.bias_kind === "standard" ? "slope 2γ" : "the bias";
  const theory = d3.range(41).map((step) => {
    const d = from + ((to - from) * step) / 40;
    return { d, odds: centre.odds + logOddsOfBias(model, d) - ofBias, line: theoryName };
  });
  const fitted =
    one.odds_slope === null
      ? []
      : [from, to].map((d) => ({ d, odds: centre.odds + one.odds_slope.value * (d - centre.d), line: "fitted slope" }));
  const odds = Plot.plot({
    style: CHART_STYLE,
    width: 320,
    height: 240,
    marginBottom: 46,
    x: { label: "difficulty d →", labelOffset: 38, nice: true },
    y: { label: "↑ log(P_M / P_S)", nice: true, grid: true },
    color: { legend: true, domain: ["fitted slope", theoryName], range: [colour("m"), colour("s")] },
    marks: [
      Plot.dot(points, { x: "d", y: "odds", r: 1.5, fill: colour("dot"), fillOpacity: 0.45 }),
      Plot.line([...fitted, ...theory], { x: "d", y: "odds", stroke: "line", strokeWidth: 2.5, strokeDasharray: null }),
    ],
  });
  const histogram = Plot.plot({
    style: CHART_STYLE,
    width: 320,
    height: 130,
    marginBottom: 46,
    x: { label: "difficulty d →", labelOffset: 38, domain: [0, 1] },
    y: { label: "↑ tokens", ticks: 3 },
    marks: [Plot.rectY(one.difficulty, Plot.binX({ y: "count" }, { thresholds: d3.range(0, 1.0001, 0.025), fill: colour("m") })), Plot.ruleY([0])],
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
