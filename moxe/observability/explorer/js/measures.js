// What the text can be shaded by, and the theory's odds.

const MEAN = "mean";

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function groupSize(model) {
  return model.settings.num_experts / 2;
}

function groupOf(model, expert) {
  return expert < groupSize(model) ? "M" : "S";
}

function expertName(model, expert) {
  return `${groupOf(model, expert)}${expert}`;
}

// What the experts of a group are.
function kindOf(model, group) {
  const kinds = { xlstm: { M: "mLSTM", S: "sLSTM" }, mlstm: { M: "mLSTM", S: "mLSTM" }, slstm: { M: "sLSTM", S: "sLSTM" } };
  return (kinds[model.settings.expert_kind] ?? { M: "feed-forward", S: "feed-forward" })[group];
}

// The K experts of a token in a layer, the heaviest first.
function expertsOf(model, layer, token) {
  const k = model.settings.num_experts_per_tok;
  return d3.range(k).map((place) => ({
    expert: model.layers[layer].experts[token * k + place],
    weight: model.layers[layer].weights[token * k + place],
  }));
}

function weightOfGroupM(model, layer, token) {
  return d3.sum(expertsOf(model, layer, token), ({ expert, weight }) => (groupOf(model, expert) === "M" ? weight : 0));
}

// The log-odds that the bias adds to group M: 2 gamma d for the paper's bias (equation 6).
function logOddsOfBias(model, d) {
  if (model.settings.bias_kind === "standard") return 2 * model.settings.gamma * d;
  const above = Math.max(0, d - model.settings.difficulty_threshold);
  if (model.settings.bias_kind === "proportional") return 2 * model.settings.gamma * above;
  return above > 0 ? 2 * model.settings.gamma * d : 0;
}

// `of(model, layer, token)` is a number or null; without `byLayer` the layer means nothing.
const MEASURES = {
  difficulty: {
    label: "difficulty d",
    byLayer: true,
    isThere: (model) => model.layers[0].difficulty !== null,
    of: (model, layer, token) => model.layers[layer].difficulty[token],
  },
  loss: { label: "loss of the token", unit: " nats", of: (model, layer, token) => model.losses[token] },
  next_loss: {
    label: "loss of the token after it",
    unit: " nats",
    of: (model, layer, token) => model.losses[token + 1] ?? null,
  },
  entropy: {
    label: "entropy of the router",
    byLayer: true,
    of: (model, layer, token) => model.layers[layer].entropy[token],
  },
  group_m: {
    label: "mLSTM share (weight of group M)",
    byLayer: true,
    range: [0, 1],
    of: weightOfGroupM,
  },
  rarity: { label: "rarity of the token", unit: " nats", of: (model, layer, token) => model.rarity[token] },
};

// A model with fewer layers than the other on the page shows the mean of all where it has no such layer.
function layerIn(model, layer) {
  return layer < model.layers.length ? layer : MEAN;
}

// The measure of every token in a layer, or in the mean of all.
function valuesOf(model, name, chosenLayer) {
  const measure = MEASURES[name];
  const layer = layerIn(model, chosenLayer);
  const layers = measure.byLayer && layer === MEAN ? d3.range(model.layers.length) : [layer === MEAN ? 0 : layer];
  return model.pieces.map((_, token) => {
    const values = layers.map((number) => measure.of(model, number, token));
    return values.includes(null) ? null : mean(values);
  });
}

function hasMeasure(model, name) {
  return MEASURES[name].isThere?.(model) ?? true;
}

function layerLabel(layer) {
  return layer === MEAN ? "the mean of all layers" : `layer ${layer}`;
}
