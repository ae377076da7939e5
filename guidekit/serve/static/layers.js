// The prompt with its tokens, and the list of layers: phrase, visibility, strength.

import { api } from "./api.js";
import { $, el, later, say } from "./dom.js";
import { state, colour, dropLayer, newLayer, keepDraft, keepSoon } from "./state.js";

let found = { tokens: [], phrases: [], unknown: [] }; // what the server said last
let asked = null, latest;

export function bindLayers(easel) {
  const told = later(200, () => askTokens());
  const typed = (key) => (event) => {
    state[key] = event.target.value;
    keepSoon();
    told();
  };
  $("prompt").addEventListener("input", typed("prompt"));
  $("negative").addEventListener("input", typed("negative"));
  $("add-layer").addEventListener("click", () => {
    state.selected = newLayer("").value;
    showLayers(easel);
    document.querySelector(".layer.selected .phrase").focus();
    keepDraft();
  });
}

export function showAsk(easel) {
  $("prompt").value = state.prompt;
  $("negative").value = state.negative;
  if (state.negative) $("negative").closest("details").open = true;
  showLayers(easel);
  askTokens();
}

// Which tokens the phrases are, by the server's own tokenizer; the error if it does not answer.
export const askTokens = () => (latest = ask());

async function ask() {
  asked?.abort();
  const own = (asked = new AbortController());
  const phrases = state.layers.map((one) => ({ phrase: one.phrase, ...one.more }));
  try {
    const text = await api.tokens({ model: state.model, prompt: state.prompt, phrases }, own.signal);
    if (own !== asked) return latest;
    found = text;
    showTokens();
    return null;
  } catch (error) {
    if (own !== asked) return latest;
    found = { tokens: [], phrases: phrases.map(() => ({ error: error.message })), unknown: [] };
    showTokens();
    return error;
  }
}

export const phrasesFit = () => found.phrases.every((one, i) => !one.error || !state.layers[i]?.visible);

function showTokens() {
  const owner = {};
  found.phrases.forEach((one, i) => (one.columns ?? []).forEach((column) => (owner[column] = state.layers[i])));
  $("tokens").replaceChildren(
    ...found.tokens.map(({ column, start, end }) => {
      const made = el("span", { className: "token", title: `token ${column}` }, state.prompt.slice(start, end));
      if (owner[column]) {
        made.classList.add("used");
        made.style.borderBottomColor = colour(owner[column].value);
      }
      return made;
    }),
  );
  const words = found.unknown.map((word) => `“${word}”`).join(", ");
  $("unknown").hidden = !words;
  $("unknown").textContent = words && `This small model has never read ${words}.`;
  state.layers.forEach((one, i) => {
    const line = document.querySelector(`[data-about="${one.value}"]`);
    if (line) about(line, one, found.phrases[i]);
  });
}

function about(line, one, answer) {
  const columns = answer?.columns ?? [];
  const words = found.tokens.filter((token) => columns.includes(token.column));
  const error = one.phrase.trim() ? answer?.error : "Name words of the prompt.";
  line.classList.toggle("error", Boolean(error));
  const tokens = words.map((token) => `${token.column} ${state.prompt.slice(token.start, token.end)}`).join(", ");
  line.textContent = error ? sentence(error) : [tokens && `tokens ${tokens}`, covered(one)].filter(Boolean).join(" · ");
  line.parentElement.querySelector(".phrase").setAttribute("aria-invalid", Boolean(error));
}

function sentence(text) {
  return /does not occur in the prompt/.test(text) ? "Not in the prompt. Write these words there." : text;
}

function covered(one) {
  if (one.place?.box) return "a box";
  const share = state.map.counts()[one.value] / state.map.values.length;
  return share ? `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %` : "nothing painted yet";
}

export function showCoverage() {
  state.layers.forEach((one, i) => {
    const line = document.querySelector(`[data-about="${one.value}"]`);
    if (line && found.phrases[i]) about(line, one, found.phrases[i]);
  });
}

export function showLayers(easel) {
  $("layers").replaceChildren(...state.layers.map((one) => row(one, easel)));
  showTokens();
}

function row(one, easel) {
  const choose = () => {
    if (state.selected === one.value) return;
    state.selected = one.value;
    showSelected();
    keepDraft();
  };
  const name = () => one.phrase || "unnamed";
  const swatch = el("button", {
    className: "swatch", type: "button", role: "radio", title: "Paint with this layer",
    "aria-checked": state.selected === one.value, "aria-label": `Paint with ${name()}`, onclick: choose,
  });
  swatch.style.background = colour(one.value);
  const told = later(150, askTokens);
  const phrase = el("input", {
    className: "phrase", value: one.phrase, placeholder: "words of the prompt", spellcheck: false,
    "aria-label": "Phrase", "aria-describedby": `about-${one.value}`, autocomplete: "off", onfocus: choose,
    oninput: () => {
      one.phrase = phrase.value;
      swatch.setAttribute("aria-label", `Paint with ${name()}`);
      told();
      keepSoon();
    },
  });
  const eye = el("button", {
    className: "icon", type: "button", "aria-pressed": one.visible, title: "Hidden layers are not drawn",
    "aria-label": `Show ${name()}`, onclick: () => {
      one.visible = !one.visible;
      eye.setAttribute("aria-pressed", one.visible);
      eye.textContent = one.visible ? "Shown" : "Hidden";
      easel.draw();
      keepDraft();
    },
  }, one.visible ? "Shown" : "Hidden");
  const drop = el("button", {
    className: "icon", type: "button", title: "Remove the layer", "aria-label": `Remove ${name()}`,
    onclick: () => remove(one, easel),
  }, "✕");
  const strength = el("input", { type: "range", min: 0, max: 2, step: 0.05, value: one.strength, "aria-label": `Strength of ${name()}` });
  const out = el("output", {}, one.strength.toFixed(2));
  strength.addEventListener("input", () => {
    one.strength = +strength.value;
    out.textContent = one.strength.toFixed(2);
    keepDraft();
  });
  const item = el("li", { className: "layer", "data-layer": one.value },
    el("div", { className: "row" }, swatch, phrase, eye, drop),
    el("p", { className: "about", id: `about-${one.value}`, "data-about": one.value }),
    el("label", { className: "slide" }, "Strength", strength, out));
  item.classList.toggle("selected", state.selected === one.value);
  return item;
}

function remove(one, easel) {
  dropLayer(one, () =>
    easel.change((map) => {
      for (let i = 0; i < map.values.length; i++) if (map.values[i] === one.value) map.values[i] = 0;
    }));
  showLayers(easel);
  easel.draw();
  askTokens();
  keepDraft();
  say("Layer removed");
}

// Which layer is painted with, after it was chosen elsewhere.
export function showSelected() {
  for (const item of $("layers").children) {
    const on = item.dataset.layer === String(state.selected);
    item.classList.toggle("selected", on);
    item.querySelector(".swatch").setAttribute("aria-checked", on);
  }
}
