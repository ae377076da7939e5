// Knobs: of sampling, and of each plugin from what the server says of its fields.

import { $, el } from "./dom.js";
import { state, keepDraft } from "./state.js";

let ids = 0;

// A control for one option. Its value is undefined where the default stands.
export function control(knob, value, changed) {
  const id = `knob-${++ids}`;
  const shown = value === undefined ? knob.default : value;
  if (knob.control === "switch") {
    const box = el("input", { type: "checkbox", id, checked: Boolean(shown), onchange: () => changed(box.checked) });
    return field(knob, id, box, "switch");
  }
  const choices = knob.presets?.length ? ["", ...knob.presets] : knob.choices;
  if (choices?.length && !knob.list) {
    const box = el("select", { id, onchange: () => changed(box.value) }, ...choices.map((one) => el("option", { value: one }, one || "none")));
    box.value = shown ?? "";
    return field(knob, id, box, "");
  }
  if (knob.option === "start" || knob.option === "stop") return slider(knob, id, shown, changed);
  const numeric = ["number", "whole"].includes(knob.control) && !knob.list;
  const text = Array.isArray(shown) ? shown.join(", ") : (shown ?? "");
  const box = el("input", { id, value: String(text), autocomplete: "off", spellcheck: false });
  if (numeric) {
    box.type = "number";
    box.step = knob.control === "whole" ? 1 : "any";
  }
  if (knob.choices?.length) box.placeholder = knob.choices.join(", ");
  box.addEventListener("change", () => changed(read(box.value, knob, numeric)));
  if (knob.control !== "file") return field(knob, id, box, numeric ? "" : "full");
  box.setAttribute("list", `${id}-files`);
  const names = el("datalist", { id: `${id}-files` }, ...files(knob).map((value) => el("option", { value })));
  return field(knob, id, el("div", {}, box, names), "full");
}

function read(text, knob, numeric) {
  if (numeric) return text === "" ? undefined : +text;
  if (!knob.list) return text;
  const parts = text.split(",").map((part) => part.trim()).filter(Boolean);
  return ["number", "whole"].includes(knob.control) ? parts.map(Number) : parts;
}

// What an option of files may name here: what was added, what the server was started with.
function files(knob) {
  const found = [...Object.keys(state.files), ...state.about.files, String(knob.default ?? ""), "scene-3"];
  return [...new Set(found)].filter(Boolean);
}

function slider(knob, id, value, changed) {
  const out = el("output", { htmlFor: id }, (+value).toFixed(2));
  const box = el("input", { type: "range", id, min: 0, max: 1, step: 0.01, value, oninput: () => {
    out.textContent = (+box.value).toFixed(2);
    changed(+box.value);
  } });
  return field(knob, id, el("div", { className: "window" }, box, out), "");
}

export function field(knob, id, box, kind) {
  const words = knob.comment ? el("span", { className: "help", id: `${id}-help` }, knob.comment) : null;
  if (words) (box.id ? box : box.querySelector("input, select")).setAttribute("aria-describedby", words.id);
  const name = el("label", { htmlFor: id, title: knob.words ?? "" }, knob.label ?? knob.option);
  return el("div", { className: `field ${kind}` }, ...(kind === "switch" ? [box, name] : [name, box]), words);
}

const plugin = (name) => state.about.plugins.find((one) => one.name === name);

export function showPlugins() {
  $("plugins").replaceChildren(...state.plugins.map(card));
  const others = state.about.plugins.filter((one) => !state.plugins.some((used) => used.name === one.name));
  const add = $("add-plugin");
  add.replaceChildren(el("option", { value: "" }, "Add a plugin"), ...others.map((one) => el("option", { value: one.name, title: one.about }, `${one.name}: ${short(one.summary || one.about)}`)));
  add.onchange = () => {
    if (!add.value) return;
    state.plugins.push({ name: add.value, options: {} });
    showPlugins();
    keepDraft();
  };
  showAxes();
}

const short = (text) => (text.length > 70 ? `${text.slice(0, 68)}…` : text);

function card(one, index) {
  const about = plugin(one.name);
  const tuned = state.facts?.tuned?.[one.name] ?? {};
  const redraw = () => (showPlugins(), keepDraft());
  const moved = (by) => () => {
    const [item] = state.plugins.splice(index, 1);
    state.plugins.splice(index + by, 0, item);
    redraw();
  };
  const button = (text, label, act, disabled = false) =>
    el("button", { type: "button", className: "icon", "aria-label": `${label} ${one.name}`, title: label, onclick: act, disabled }, text);
  const head = el("div", { className: "head" }, el("strong", {}, one.name),
    button("↑", "Move up", moved(-1), index === 0),
    button("↓", "Move down", moved(1), index === state.plugins.length - 1),
    button("✕", "Remove", () => (state.plugins.splice(index, 1), redraw())));
  const made = (about?.knobs ?? []).map((knob) => {
    const own = { ...knob, default: knob.option in tuned ? tuned[knob.option] : knob.default };
    return control(own, one.options[knob.option], (value) => {
      const same = value === undefined || JSON.stringify(value) === JSON.stringify(own.default);
      if (same) delete one.options[knob.option];
      else one.options[knob.option] = value;
      keepDraft();
    });
  });
  // What every plugin has, and a file that it cannot do without, are in sight.
  const seen = (knob, i) => i < 3 || (knob.control === "file" && knob.default === "" && !knob.optional);
  const knobs = about?.knobs ?? [];
  const first = el("div", { className: "fields" }, ...made.filter((_, i) => seen(knobs[i], i)));
  const others = made.filter((_, i) => !seen(knobs[i], i));
  const rest = others.length ? el("details", {}, el("summary", {}, `${others.length} more`), el("div", { className: "fields" }, ...others)) : null;
  if (rest && Object.keys(one.options).some((name) => !["scale", "start", "stop"].includes(name))) rest.open = true;
  return el("li", { className: "plugin" }, head, el("p", {}, about?.about ?? ""), first, rest);
}

export function showSampling() {
  const facts = state.facts;
  const limits = state.about.limits;
  const knobs = [
    { option: "seeds", default: "0-3", control: "text", comment: `such as 0-3 or 0,5,9; ${limits.images} at most` },
    { option: "steps", default: facts.steps, control: "whole" },
    { option: "cfg", default: facts.cfg, control: "number", comment: "scale of classifier-free guidance; 1: none" },
    { option: "scheduler", default: "", control: "choice", choices: ["", ...facts.schedulers] },
    { option: "width", default: facts.width, control: "whole" },
    { option: "height", default: facts.height, control: "whole" },
    { option: "eta", default: 0, control: "number", comment: "noise of a DDIM step" },
    { option: "batch", default: 4, control: "whole", comment: "images drawn together" },
    { option: "compare", default: true, control: "switch", comment: "draw the same seeds unguided too" },
    { option: "append_phrases", default: false, control: "switch", comment: "append phrases that the prompt lacks" },
  ];
  if (!facts.reads_text) knobs.push({ option: "label", default: undefined, control: "whole", comment: "number of a class" });
  if (facts.reads_image || state.sample.image || Object.keys(state.files).length)
    knobs.push({ option: "image", default: "", control: "choice", choices: ["", ...Object.keys(state.files)], comment: "image to follow" });
  // What a run that was opened set besides, so that it is seen and can be taken back.
  const shown = new Set([...knobs.map((knob) => knob.option), "map", "labels", "affinity"]);
  for (const [option, value] of Object.entries(state.sample))
    if (!shown.has(option)) knobs.push({ option, default: "", control: typeof value === "number" ? "number" : "text" });
  const made = knobs.map((knob) =>
    control(knob, state.sample[knob.option], (value) => {
      if (value === undefined || value === "" || value === knob.default) delete state.sample[knob.option];
      else state.sample[knob.option] = value;
      keepDraft();
    }));
  for (const box of made) {
    const input = box.querySelector("input, select");
    if (input.type === "checkbox") box.classList.add("full");
    else box.classList.remove("full");
  }
  const scheduler = made[3].querySelector("option");
  scheduler.textContent = `the model's (${facts.scheduler.replace(/Scheduler$/, "")})`;
  $("sampling").replaceChildren(...made);
}

// The options that a grid may go over: those of the plugins in use, and of sampling.
export function showAxes() {
  const names = ["", "cfg", "steps", "scheduler", "eta"];
  for (const one of state.plugins) names.push(...(plugin(one.name)?.knobs ?? []).map((knob) => `${one.name}.${knob.option}`));
  for (const i of [0, 1]) {
    const [select, values] = [$(`axis-${i}`), $(`values-${i}`)];
    const own = state.grid[i][0];
    if (own && !own.includes(".") && !names.includes(own)) names.push(own); // of a run that was opened
    if (!names.includes(own)) state.grid[i][0] = "";
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name || "none")));
    select.value = state.grid[i][0];
    values.value = state.grid[i][1];
    select.onchange = values.oninput = () => {
      state.grid[i] = [select.value, values.value];
      keepDraft();
    };
  }
  if (state.grid.some(([name]) => name)) $("grid").open = true;
}
