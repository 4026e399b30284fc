// The page: one view a model, and what all of them share: the measure, the layer, the chosen token and expert.

const data = JSON.parse(document.getElementById("data").textContent);
const models = data.models;
const controls = Object.fromEntries(["measure", "layer", "clear", "first"].map((id) => [id, document.getElementById(id)]));
const state = {
  measure: models.some((model) => hasMeasure(model, "difficulty")) ? "difficulty" : "loss",
  layer: MEAN,
  pointed: null, // of one model: {view, index}
  focused: null, // likewise
  expert: null, // of one model: {view, layer, expert}
  expertsLayer: 0, // whose experts are shown, of all models alike
};

class View {
  constructor(model) {
    this.model = model;
    const copy = document.getElementById("model").content.cloneNode(true);
    this.section = copy.querySelector("section");
    this.parts = {};
    for (const part of copy.querySelectorAll("[data-part]")) this.parts[part.dataset.part] = part;
    document.getElementById("models").append(copy);
    this.parts.name.textContent = model.name;
    this.section.setAttribute("aria-label", model.name);
    this.parts.facts.append(...facts(model));
    this.parts.warnings.append(...warnings(model));
    this.parts.differences.append(...differences(model));
    this.parts.differences.hidden = this.parts.differences.childElementCount === 0;
    this.tokens = makeText(this.parts, model, {
      point: (token) => pointAt(this, token),
      leave: pointAway,
      focus: (token) => focusOn(this, token),
    });
    this.starts = startsOf(model.pieces);
    this.parts["experts-layer"].append(...d3.range(model.layers.length).map((layer) => option(layer, layer)));
    this.parts["experts-layer"].addEventListener("change", (event) => {
      showExpertsOf(Number(event.target.value));
    });
    this.draw();
    this.shade();
  }

  // Charts take their colours and widths from the page, so they are drawn anew when it turns dark or narrow.
  draw() {
    const focused = this.load?.buttons.indexOf(document.activeElement);
    this.load = showLoad(this.parts, this.model, models, (expert) => this.choose(expert));
    showTheory(this.parts, this.model, models);
    this.showExperts();
    markLoad(this.load, this.expert());
    this.load.buttons[focused]?.focus({ preventScroll: true });
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
    this.lit = lightText(this.parts, this.model, this.tokens, this.expert());
  }

  showExperts() {
    const layer = expertsLayerOf(this.model);
    this.parts["experts-layer"].value = layer;
    const focused = this.parts.experts.contains(document.activeElement)
      ? document.activeElement.closest("[data-expert]")?.dataset.expert
      : undefined;
    const most = d3.max(models, (model) => mostReach(model, expertsLayerOf(model)));
    showExperts(this.parts, this.model, layer, most, this.expert(), (expert) => this.choose(expert));
    if (focused !== undefined) this.parts.experts.querySelector(`[data-expert="${focused}"] button`).focus();
  }

  // The token that holds the same place of the text as one of any model, whose tokenizer may be another.
  tokenAt(chosen) {
    if (chosen === null || chosen.view === this) return chosen?.index ?? null;
    const start = chosen.view.starts[chosen.index];
    if (this.starts[chosen.index] === start) return chosen.index;
    const last = d3.bisectRight(this.starts, start) - 1;
    const isBehind = start >= this.starts.at(-1) + this.model.pieces.at(-1).length;
    return isBehind && last === this.starts.length - 1 ? null : d3.bisectLeft(this.starts, this.starts[last]);
  }

  showToken() {
    const here = this.tokenAt(state.pointed ?? state.focused);
    showToken(this.parts, this.model, here, layerIn(this.model, state.layer));
    this.tokens[this.selected]?.setAttribute("aria-selected", "false");
    this.selected = here;
    this.tokens[here]?.setAttribute("aria-selected", "true");
    if (here !== null && state.pointed === null) scrollTo(this.parts.text, this.tokens[here]);
  }
}

// Where in the text the character of each token begins: one that only completes a character begins where that does.
function startsOf(pieces) {
  let start = 0;
  let end = 0;
  return pieces.map((piece) => {
    if (piece !== "") start = end;
    end += piece.length;
    return start;
  });
}

function facts(model) {
  const loss = mean(model.losses);
  const pairs = [
    ["text", `${data.text_name}, ${plural(model.pieces.length, "token")}`],
    ["loss", `${decimal(loss)} nats a token`],
    ["layers", model.layers.length],
    ["experts", `${model.settings.num_experts} a layer, ${model.settings.num_experts_per_tok} a token`],
    ...(hasMeasure(model, "difficulty") ? [["γ", model.settings.gamma]] : []),
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

// What the mouse points at is shown until it leaves the text for a token that was chosen before; without one it stays, so
// that the mouse can go to the details.
function pointAt(view, index) {
  if (state.pointed?.view === view && state.pointed.index === index) return;
  state.pointed = { view, index };
  views.forEach((one) => one.showToken());
}

function pointAway() {
  if (state.pointed === null || state.focused === null) return;
  state.pointed = null;
  views.forEach((one) => one.showToken());
}

function focusOn(view, index) {
  state.focused = { view, index };
  state.pointed = null;
  views.forEach((one) => one.showToken());
  say(summary(view.model, index, layerIn(view.model, state.layer)));
}

// For screen readers, which tell of changes in an element that was there before.
function say(words) {
  document.getElementById("spoken").textContent = words;
}

function chooseExpert(expert) {
  state.expert = expert;
  controls.clear.setAttribute("aria-disabled", String(expert === null)); // not disabled, which would lose the focus
  controls.clear.textContent = expert === null ? "All experts" : `Only ${expertTitle(expert)}: show all`;
  if (expert !== null) state.expertsLayer = expert.layer;
  for (const view of views) {
    markLoad(view.load, view.expert());
    view.light();
    view.showExperts();
  }
  const lit = expert === null ? 0 : expert.view.lit.size;
  if (lit === 0 && document.activeElement === controls.first) controls.clear.focus();
  controls.first.hidden = lit === 0;
  const words = expert === null ? "all tokens" : `${count(lit)} of ${plural(expert.view.model.pieces.length, "token")}`;
  controls.first.textContent = `Go to the first of ${words}`;
  say(expert === null ? "All experts" : `${expertTitle(expert)}: ${words}`);
}

function goToFirst() {
  const { tokens, lit } = state.expert.view;
  tokens[Math.min(...lit)].focus();
}

// The last, where a model has fewer layers than the other.
function expertsLayerOf(model) {
  return Math.min(state.expertsLayer, model.layers.length - 1);
}

function showExpertsOf(layer) {
  state.expertsLayer = layer;
  views.forEach((view) => view.showExperts());
}

function expertTitle({ view, layer, expert }) {
  const name = `${expertName(view.model, expert)} of layer ${layer}`;
  const folders = models.map((model) => model.name.replace(/[/\\]+$/, "").split(/[/\\]/).at(-1));
  if (models.length === 1) return name;
  return `${name}, ${folders[0] === folders[1] ? view.model.name : folders[views.indexOf(view)]}`;
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
  views.forEach((view) => view.shade());
}

function readLayer() {
  readControls();
  if (state.layer !== MEAN) showExpertsOf(state.layer);
}

document.body.classList.toggle("pair", models.length > 1);
document.getElementById("about-difficulty").hidden = !models.every((model) => hasMeasure(model, "difficulty"));
if (!models.every((model) => model.settings.expert_kind === "xlstm")) MEASURES.group_m.label = "weight of group M";
fillControls();
const views = [];
for (const model of models) views.push(new View(model));
controls.measure.addEventListener("change", readControls);
controls.layer.addEventListener("change", readLayer);
controls.clear.addEventListener("click", () => chooseExpert(null));
controls.first.addEventListener("click", goToFirst);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.expert !== null) chooseExpert(null);
});
const draw = () => views.forEach((view) => view.draw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
let width = innerWidth;
addEventListener("resize", () => {
  if (width !== innerWidth) draw();
  width = innerWidth;
});
