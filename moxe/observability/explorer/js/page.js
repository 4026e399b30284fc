// The page: one view a model, and what all of them share: the measure, the layer, the chosen token and expert.

const data = JSON.parse(document.getElementById("data").textContent);
const models = data.models;
const controls = Object.fromEntries(["measure", "layer", "clear"].map((id) => [id, document.getElementById(id)]));
const state = {
  measure: models.some((model) => hasMeasure(model, "difficulty")) ? "difficulty" : "loss",
  layer: MEAN,
  pointed: null, // of one model: {view, index}
  focused: null, // likewise
  expert: null, // of one model: {view, layer, expert}
};

class View {
  constructor(model, index) {
    this.model = model;
    this.index = index;
    const copy = document.getElementById("model").content.cloneNode(true);
    this.section = copy.querySelector("section");
    this.parts = {};
    for (const part of copy.querySelectorAll("[data-part]")) this.parts[part.dataset.part] = part;
    document.getElementById("models").append(copy);
    this.expertsLayer = 0;
    this.parts.name.textContent = model.name;
    this.section.setAttribute("aria-label", model.name);
    this.parts.facts.append(...facts(model));
    this.parts.warnings.append(...warnings(model));
    this.parts.differences.append(...differences(model));
    this.tokens = makeText(this.parts, model, (change) => chooseToken(this, change));
    this.starts = d3.cumsum(["", ...model.pieces], (piece) => piece.length);
    this.parts["experts-layer"].append(...d3.range(model.layers.length).map((layer) => option(layer, layer)));
    this.parts["experts-layer"].addEventListener("change", (event) => {
      this.expertsLayer = Number(event.target.value);
      this.showExperts();
    });
    this.draw();
    this.shade();
  }

  // Charts take their colours from the page, so they are drawn anew when it turns dark or light.
  draw() {
    this.load = showLoad(this.parts, this.model, (expert) => this.choose(expert));
    showTheory(this.parts, this.model);
    this.showExperts();
    markLoad(this.load, this.expert());
  }

  expert() {
    return state.expert?.view === this ? state.expert : null;
  }

  choose({ layer, expert }) {
    const chosen = this.expert();
    const isSame = chosen !== null && chosen.layer === layer && chosen.expert === expert;
    chooseExpert(isSame ? null : { view: this, layer, expert });
  }

  shade() {
    shadeText(this.parts, this.model, this.tokens, state, endsOf(models, state.measure, state.layer));
    this.light();
    this.showToken();
  }

  light() {
    lightText(this.parts, this.model, this.tokens, this.expert());
  }

  showExperts() {
    this.parts["experts-layer"].value = this.expertsLayer;
    const focused = this.parts.experts.contains(document.activeElement)
      ? document.activeElement.closest("[data-expert]")?.dataset.expert
      : undefined;
    showExperts(this.parts, this.model, this.expertsLayer, this.expert(), (expert) => this.choose(expert));
    if (focused !== undefined) this.parts.experts.querySelector(`[data-expert="${focused}"] button`).focus();
  }

  // The token that holds the same place of the text as one of any model, whose tokenizer may be another.
  tokenAt(chosen) {
    if (chosen === null || chosen.view === this) return chosen?.index ?? null;
    const start = chosen.view.starts[chosen.index];
    if (this.starts[chosen.index] === start && chosen.index < this.model.pieces.length) return chosen.index;
    return start < this.starts.at(-1) ? d3.bisectRight(this.starts, start) - 1 : null;
  }

  showToken() {
    const here = this.tokenAt(state.pointed ?? state.focused);
    showToken(this.parts, this.model, here, layerIn(this.model, state.layer));
    this.tokens[this.selected]?.setAttribute("aria-selected", "false");
    this.selected = here;
    this.tokens[here]?.setAttribute("aria-selected", "true");
  }
}

function facts(model) {
  const loss = mean(model.losses);
  const pairs = [
    ["text", `${data.text_name}, ${count(model.pieces.length)} tokens`],
    ["loss", `${decimal(loss)} nats a token`],
    ["layers", model.layers.length],
    ["experts", `${model.settings.num_experts} a layer, ${model.settings.num_experts_per_tok} a token`],
    ["γ", model.settings.gamma],
  ];
  return pairs.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));
}

// The settings in which two models of a page differ.
function differences(model) {
  const other = models.find((one) => one !== model);
  const names = Object.keys(model.settings).filter(
    (name) => other !== undefined && JSON.stringify(model.settings[name]) !== JSON.stringify(other.settings[name]),
  );
  return names.map((name) => element("div", {}, element("dt", {}, name), element("dd", {}, String(model.settings[name]))));
}

// What a reader should know before any picture.
function warnings(model) {
  const collapsed = d3.range(model.layers.length).filter((layer) => model.layers[layer].is_collapsed);
  const found = [];
  if (collapsed.length > 0) {
    const where = collapsed.length === model.layers.length ? "every layer" : `layer ${collapsed.join(", ")}`;
    found.push(
      `The difficulty has collapsed in ${where}: it is nearly the same for all tokens of this text, so it decides nothing there, ` +
        "and a slope on it means nothing.",
    );
  }
  return found.map(warning);
}

function chooseToken(view, change) {
  const changed = Object.entries(change).filter(([name, index]) => {
    const before = state[name];
    return index === null ? before !== null : before?.view !== view || before.index !== index;
  });
  if (changed.length === 0) return;
  for (const [name, index] of changed) state[name] = index === null ? null : { view, index };
  views.forEach((view) => view.showToken());
}

function chooseExpert(expert) {
  state.expert = expert;
  controls.clear.disabled = expert === null;
  controls.clear.textContent = expert === null ? "All experts" : `Only ${expertTitle(expert)}: show all`;
  for (const view of views) {
    if (expert?.view === view) view.expertsLayer = expert.layer;
    markLoad(view.load, view.expert());
    view.light();
    view.showExperts();
  }
}

function expertTitle({ view, layer, expert }) {
  const name = `${expertName(view.model, expert)} of layer ${layer}`;
  return models.length > 1 ? `${name}, ${view.model.name}` : name;
}

function fillControls() {
  for (const [name, { label }] of Object.entries(MEASURES)) {
    const choice = option(name, label);
    choice.disabled = !models.some((model) => hasMeasure(model, name));
    controls.measure.append(choice);
  }
  const most = d3.max(models, (model) => model.layers.length);
  controls.layer.append(option(MEAN, "mean of all"), ...d3.range(most).map((layer) => option(layer, layer)));
  controls.measure.value = state.measure;
  controls.layer.value = state.layer;
}

function readControls() {
  state.measure = controls.measure.value;
  state.layer = controls.layer.value === MEAN ? MEAN : Number(controls.layer.value);
  controls.layer.disabled = !MEASURES[state.measure].byLayer;
  for (const view of views) {
    if (layerIn(view.model, state.layer) !== MEAN) view.expertsLayer = state.layer;
    view.shade();
    view.showExperts();
  }
}

document.body.classList.toggle("pair", models.length > 1);
fillControls();
const views = [];
for (const [index, model] of models.entries()) views.push(new View(model, index));
controls.measure.addEventListener("change", readControls);
controls.layer.addEventListener("change", readControls);
controls.clear.addEventListener("click", () => chooseExpert(null));
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.expert !== null) chooseExpert(null);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => views.forEach((view) => view.draw()));
