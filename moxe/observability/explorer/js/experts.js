// The experts of one layer: what each likes, and the memory it keeps.

function showExperts(parts, model, layer, chosen, choose) {
  const { likings } = model.layers[layer];
  const memory = model.layers[layer].memory.includes(null) ? null : model.layers[layer].memory;
  const { name, tokens, routed_tokens } = model.corpus;
  parts["experts-note"].textContent =
    `What an expert likes: tokens that it receives more often than its load explains, beyond what chance brings, in ` +
    `${count(routed_tokens)} tokens of ${name}. Rarity is counted in ${count(tokens)} tokens of the same. ` +
    (memory === null
      ? "These experts keep no memory."
      : "Memory: an expert sees only the tokens routed to it. Its forget gates say how much of the past each of them leaves, and " +
        "so how far back in the text a token still has half of its weight, over all tokens and heads (mLSTM) or units (sLSTM).");
  parts.memory.replaceChildren(...(memory === null ? [] : [memoryChart(model, memory)]));
  const cards = d3.range(model.settings.num_experts).map((expert) => {
    const isChosen = chosen !== null && chosen.layer === layer && chosen.expert === expert;
    const button = element("button", { type: "button", "aria-pressed": String(isChosen) }, "Light up its tokens");
    button.addEventListener("click", () => choose({ layer, expert }));
    const group = groupOf(model, expert);
    return element(
      "section",
      { class: `card ${group.toLowerCase()}-group`, "data-expert": expert },
      element(
        "div",
        { class: "heading" },
        element("h4", {}, `${expertName(model, expert)} (${kindOf(model, group)})`),
        button,
      ),
      element("p", {}, `${percent(model.layers[layer].load[expert], 1)} of the assignments`),
      memory === null ? null : element("p", { "data-part": "memory" }, memoryWords(memory[expert])),
      likingsTable(model, likings[expert]),
    );
  });
  parts.experts.replaceChildren(...cards);
}

function likingsTable(model, likings) {
  if (likings.length === 0) {
    return element("p", { class: "note" }, "No token stands out: it takes them as they come.");
  }
  const rows = likings.map(({ token_id, chosen, occurrences, times }) => [
    piece(model.vocabulary[token_id]),
    `${count(chosen)} of ${count(occurrences)}`,
    `${decimal(times, 1)} ×`,
  ]);
  return table("Likes", ["token", "received", "its share"], rows, { numbers: [1, 2] });
}

function reachWords(reach, bound) {
  return reach === null ? `more than ${count(bound)}` : count(Math.round(reach));
}

function memoryWords({ tokens, mean_forget_gate, reach_quantiles, reach_bound }) {
  if (tokens === 0) return "Its own sub-sequence is empty.";
  const [low, median, high] = reach_quantiles.map((reach) => reachWords(reach, reach_bound));
  return (
    `Its own sub-sequence is ${count(tokens)} ${tokens === 1 ? "token" : "tokens"} long; mean forget gate ` +
    `${decimal(mean_forget_gate, 3)}. Half of a token's weight is left ${median} text tokens back (median; the middle 80%: ` +
    `${low} to ${high}).`
  );
}

function memoryChart(model, memory) {
  const rows = memory
    .map((one, expert) => ({ ...one, expert, name: expertName(model, expert), group: groupOf(model, expert) }))
    .filter(({ tokens }) => tokens > 0)
    .map((row) => {
      const [low, median, high] = row.reach_quantiles.map((reach) => reach ?? row.reach_bound);
      return { ...row, low, median, high, isBeyond: row.reach_quantiles[1] === null };
    });
  const most = d3.max(rows, ({ high }) => high) ?? 0;
  const chart = Plot.plot({
    style: CHART_STYLE,
    width: 560,
    height: 70 + 22 * rows.length,
    marginLeft: 50,
    marginBottom: 46,
    x: {
      type: "symlog", // logarithmic, with a place for 0: a token that is forgotten at once
      label: "half of the weight is left so many text tokens back →",
      labelOffset: 38,
      grid: true,
      ticks: [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000].filter((tick) => tick <= most),
      tickFormat: "d",
    },
    y: { label: null, domain: rows.map(({ name }) => name) },
    marks: [
      Plot.ruleY(rows, { y: "name", x1: "low", x2: "high", stroke: ({ group }) => colour(group.toLowerCase()), strokeWidth: 5, strokeOpacity: 0.4 }),
      Plot.dot(rows, {
        y: "name",
        x: "median",
        r: 5,
        symbol: ({ group }) => (group === "M" ? "circle" : "square"),
        fill: ({ group, isBeyond }) => (isBeyond ? colour("page") : colour(group.toLowerCase())),
        stroke: ({ group }) => colour(group.toLowerCase()),
        title: (row) => `${row.name}: ${memoryWords(row)}`,
      }),
    ],
  });
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", "how far back each expert remembers; the numbers stand with each expert below");
  return element(
    "figure",
    {},
    chart,
    element("figcaption", { class: "note" }, "Dots: median; bars: the middle 80%; an empty dot: farther than the text goes back."),
  );
}
