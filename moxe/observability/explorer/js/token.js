// What is known of one token: its losses, the decision of every layer, and what the model expected next.

function showToken(parts, model, index, layer) {
  if (index === null) {
    parts.token.replaceChildren(
      element("h3", {}, "The chosen token"),
      element("p", { class: "note" }, "Point at a token of the text, or go to it with the arrow keys."),
    );
    return;
  }
  const facts = [
    ["token id", count(model.token_ids[index])],
    ["loss", `${decimal(model.losses[index])} nats (probability ${percent(Math.exp(-model.losses[index]), 2)})`],
    ["rarity", `${decimal(model.rarity[index])} nats`],
  ];
  parts.token.replaceChildren(
    element("h3", {}, "Token ", piece(model.pieces[index]), ` ${count(index + 1)} of ${count(model.pieces.length)}`),
    element("dl", {}, facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
    element("div", { class: "tables" }, decisions(model, index, layer), expectations(model, index)),
  );
}

// The same in one sentence, for a screen reader that goes from token to token.
function summary(model, index, chosenLayer) {
  const numbers = chosenLayer === MEAN ? d3.range(model.layers.length) : [chosenLayer];
  const layers = numbers.map((layer) => {
    const { difficulty, log_odds } = model.layers[layer];
    const experts = expertsOf(model, layer, index).map(({ expert, weight }) => `${expertName(model, expert)} ${percent(weight)}`);
    const d = difficulty === null ? "" : `difficulty ${decimal(difficulty[index])}, `;
    return `layer ${layer}: ${d}odds ${decimal(Math.exp(log_odds[index]))}, ${experts.join(", ")}`;
  });
  const next = readable(model.vocabulary[model.next_ids[(index * model.next_ids.length) / model.pieces.length]]);
  return `${spoken(model.pieces[index])}; ${layers.join("; ")}; likeliest next: ${next}`;
}

function decisions(model, index, layer) {
  const rows = model.layers.map((one, number) => {
    const experts = expertsOf(model, number, index).map(({ expert, weight }, place) => [
      place === 0 ? "" : ", ",
      element(
        "span",
        { class: "whole" },
        element("span", { class: groupOf(model, expert).toLowerCase() }, expertName(model, expert)),
        ` ${percent(weight, 1)}`,
      ),
    ]);
    const odds = decimal(Math.exp(one.log_odds[index]));
    if (one.difficulty === null) return [`${number}`, odds, experts.flat()];
    const d = one.difficulty[index];
    return [`${number}`, decimal(d, 3), odds, decimal(Math.exp(logOddsOfBias(model, d))), experts.flat()];
  });
  const hasDifficulty = model.layers[0].difficulty !== null;
  const header = ["layer", ...(hasDifficulty ? ["d", "odds", oddsOfBias(model)] : ["odds"]), "experts and weights"];
  return table("The odds are P_M / P_S.", header, rows, {
    numbers: d3.range(1, header.length - 1),
    chosen: layer === MEAN ? -1 : layer,
  });
}

function oddsOfBias(model) {
  return model.settings.bias_kind === "standard" ? "exp(2γd)" : "odds of the bias";
}

function expectations(model, index) {
  const width = model.next_ids.length / model.pieces.length;
  const next = model.token_ids[index + 1];
  const rows = d3.range(width).map((place) => {
    const id = model.next_ids[index * width + place];
    const mark = id === next ? " ← the text goes on so" : "";
    return [[piece(model.vocabulary[id]), mark], percent(model.next_probabilities[index * width + place], 1)];
  });
  const follows =
    next === undefined
      ? ["Here the text ends."]
      : ["What follows is ", piece(model.pieces[index + 1]), `, at a loss of ${decimal(model.losses[index + 1])} nats.`];
  return element(
    "div",
    {},
    table("The likeliest next tokens", ["token", "probability"], rows, { numbers: [1] }),
    element("p", {}, ...follows),
  );
}
