// The experts of one layer: what each likes, and the memory it keeps.

function memoryOf(model, layer) {
  const { memory } = model.layers[layer];
  return memory.includes(null) ? null : memory;
}

// `most` is where the axis of memory ends, of all models of the page.
function showExperts(parts, model, layer, most, chosen, choose) {
  const memory = memoryOf(model, layer);
  const { name, tokens, routed_tokens } = model.corpus;
  parts["experts-note"].textContent =
    `What an expert likes: tokens that it receives more often than its part of all tokens explains, beyond what chance ` +
    `brings, in ${plural(routed_tokens, "token")} of ${name}. Rarity is counted in ${plural(tokens, "token")} of the same. ` +
    (memory === null
      ? "These experts keep no memory."
      : "Memory: an expert sees only the tokens routed to it, its own sub-sequence, in which the start token before the text " +
        "counts too. Each of them leaves a part of what was there before, its forget gate, in every head (mLSTM) or unit (sLSTM).");
  parts.memory.replaceChildren(...(memory === null || most === 0 ? [] : [memoryFigure(parts, model, memory, most)]));
  const cards = d3.range(model.settings.num_experts).map((expert) => {
    const title = `${expertName(model, expert)}, layer ${layer}`;
    const isChosen = chosen !== null && chosen.layer === layer && chosen.expert === expert;
    const button = element(
      "button",
      { type: "button", "aria-pressed": String(isChosen), "aria-label": `Light up the tokens of ${title}` },
      "Light up",
    );
    button.addEventListener("click", () => choose({ layer, expert }));
    const group = groupOf(model, expert);
    return element(
      "section",
      { class: `card ${group.toLowerCase()}-group`, "data-expert": expert, "aria-label": title },
      element("div", { class: "heading" }, element("h4", {}, `${title} (${kindOf(model, group)})`), button),
      element("p", {}, `${percent(model.layers[layer].load[expert], 1)} of the assignments of this text`),
      memory === null ? null : element("p", { "data-part": "memory" }, memoryWords(memory[expert])),
      likes(model, model.layers[layer].preferences[expert]),
    );
  });
  parts.experts.replaceChildren(...cards);
}

function likes(model, { part, likings }) {
  const ofAll = `${percent(part)} of all tokens of the corpus`;
  if (likings.length === 0) {
    return element("p", { class: "note" }, `It receives ${ofAll}. No token stands out: it takes them as they come.`);
  }
  const rows = likings.map(({ token_id, chosen, occurrences }) => [
    piece(model.vocabulary[token_id]),
    `${count(chosen)} of ${count(occurrences)}`,
    percent(chosen / occurrences),
  ]);
  return element(
    "div",
    {},
    element("p", {}, `It receives ${ofAll}, but more of those it likes:`),
    table("", ["token", "received", "part"], rows, { numbers: [1, 2] }),
  );
}

function mostReach(model, layer) {
  return d3.max(memoryOf(model, layer) ?? [], ({ tokens, reach_quantiles, reach_bound }) => (tokens === 0 ? 0 : (reach_quantiles[2] ?? reach_bound))) ?? 0;
}

function memoryWords({ tokens, mean_forget_gate, reach_quantiles, reach_bound }) {
  if (tokens === 0) return "Its own sub-sequence is empty.";
  const gates = `Its own sub-sequence is ${plural(tokens, "token")} long; mean forget gate ${decimal(mean_forget_gate, 3)}.`;
  if (reach_bound === 0 && reach_quantiles[2] === null) return `${gates} The text is too short to show how far back it remembers.`;
  const words = (reach) => (reach === null ? `more than ${count(reach_bound)}` : count(Math.round(reach)));
  const [low, median, high] = reach_quantiles.map(words);
  const half =
    reach_quantiles[1] === 0
      ? "It holds less than half of what its token before wrote"
      : `It still holds half of what was written ${median} text tokens back`;
  return `${gates} ${half} (median; the middle 80%: ${low} to ${high}).`;
}

function memoryFigure(parts, model, memory, most) {
  const rows = memory
    .map((one, expert) => ({ ...one, expert, name: expertName(model, expert), group: groupOf(model, expert) }))
    .filter(({ tokens }) => tokens > 0)
    .map((row) => {
      const [low, median, high] = row.reach_quantiles.map((reach) => reach ?? row.reach_bound);
      return { ...row, low, median, high, isBeyond: row.reach_quantiles[1] === null };
    });
  const chart = Plot.plot({
    style: CHART_STYLE,
    width: Math.min(560, Math.max(260, parts.memory.clientWidth)),
    height: 70 + 22 * rows.length,
    marginLeft: 40,
    marginBottom: 46,
    x: {
      type: "symlog", // logarithmic, with a place for 0: a token that is forgotten at once
      domain: [0, most],
      label: "text tokens back →",
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
    element(
      "figcaption",
      { class: "note" },
      "How far back at least half of what was written is left, over the tokens and heads or units of each expert. Dots: median; " +
        "bars: the middle 80%; an empty dot: farther than the text goes back. A dot at 0 with a long bar: most units forget at once, " +
        "others go far back. Only forget gates count here, not how strongly a token was written or what was written over it.",
    ),
  );
}
