// Controls, the networks that the server was started with, and the label map.

import { $, el } from "./dom.js";
import { control as knob, field } from "./knobs.js";
import { addFile, state, keepDraft } from "./state.js";

const KNOBS = [
  { option: "scale", default: 1, control: "number" },
  { option: "start", default: 0, comment: "share of the steps, from the noisy end" },
  { option: "stop", default: 1 },
  { option: "guess", default: false, control: "switch", comment: "the null branch goes without it" },
];
const PICTURES = /\.(png|jpe?g|webp)$/i;

// redraw shows all settings anew, as a new file is a choice everywhere.
export function showControls(redraw) {
  const { facts, about } = state;
  const takes = facts.takes_controls && about.controls.length > 0;
  $("control-part").hidden = !takes && !state.control.length;
  $("map-part").hidden = !takes && !facts.reads_map && !state.sample.map;
  $("controls").replaceChildren(...state.control.map((one, index) => card(one, index, redraw)));
  const add = $("add-control");
  add.replaceChildren(el("option", { value: "" }, "Add a control"), ...about.controls.map((name) => el("option", { value: name }, name)));
  add.onchange = () => {
    if (!add.value) return;
    state.control.push({ model: add.value });
    keepDraft();
    redraw();
  };
  showMap(redraw);
}

function set(table, key, value, standard) {
  if (value === undefined || value === "" || value === standard) delete table[key];
  else table[key] = value;
  keepDraft();
}

function card(one, index, redraw) {
  const drop = el("button", { type: "button", className: "icon", "aria-label": `Remove ${one.model}`, title: "Remove", onclick: () => {
    state.control.splice(index, 1);
    keepDraft();
    redraw();
  } }, "✕");
  const made = KNOBS.map((own) => knob(own, one[own.option], (value) => set(one, own.option, value, own.default)));
  const seen = picture(`control-image-${index}`, "Image", one.image, "the label map", (name) => set(one, "image", name), redraw);
  return el("li", { className: "plugin" }, el("div", { className: "head" }, el("strong", {}, one.model), drop),
    el("div", { className: "fields" }, seen, ...made));
}

// One of the images that were added, or a new one.
function picture(id, label, value, none, changed, redraw, look = true) {
  const names = Object.keys(state.files).filter((name) => PICTURES.test(name));
  const box = el("select", { id, onchange: () => (changed(box.value), redraw()) },
    el("option", { value: "" }, none), ...names.map((name) => el("option", { value: name }, name)));
  box.value = value ?? "";
  const file = el("input", { type: "file", accept: ".png,.jpg,.jpeg,.webp", "aria-label": `${label}: a new file`, onchange: async () => {
    if (!file.files[0]) return;
    changed(await addFile(file.files[0]));
    redraw();
  } });
  const shown = look && value && state.files[value] ? el("img", { className: "seen", alt: `${label}: ${value}`, src: `data:;base64,${state.files[value]}` }) : null;
  return field({ option: label }, id, el("div", { className: "pick" }, box, el("label", { className: "button quiet" }, "File", file), shown), "full");
}

function showMap(redraw) {
  const { sample, about } = state;
  const map = picture("map-file", "Map", sample.map, "none", (name) => {
    set(sample, "map", name);
    if (!sample.map) for (const key of ["labels", "affinity"]) delete sample[key];
  }, redraw, false); // numbers of classes are black to the eye
  const sets = ["", ...about.labels, ...[...about.files, ...Object.keys(state.files)].filter((name) => name.endsWith(".json"))];
  const own = [
    { option: "labels", label: "Label set", choices: sets, comment: "of the map's numbers or colours; none: the model's own" },
    { option: "affinity", label: "Affinity", choices: ["", ...about.files], comment: "to the classes of the model" },
  ].filter((one) => one.choices.length > 1);
  const made = sample.map ? own.map((one) => knob({ ...one, control: "choice" }, sample[one.option], (value) => set(sample, one.option, value))) : [];
  $("label-map").replaceChildren(map, ...made);
}
