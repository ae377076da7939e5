// What the user has asked for so far, kept in the tab so that a reload loses nothing.

import { packed, unpacked, toBase64, fromBase64, greyPng } from "./bytes.js";
import { later } from "./dom.js";
import { LayerMap } from "./map.js";

const DRAFT = "guidekit-draft";

export const state = {
  about: null, // what GET /api said
  facts: null, // of the model
  model: null,
  prompt: "",
  negative: "",
  sample: {}, // keys of [sample] that the user set
  plugins: [], // {name, options}
  control: [], // tables of run.json, by the names of the server's networks
  layers: [], // {value, phrase, strength, negative, visible, place, more}
  gone: {}, // layers that were removed, by value, as long as undo may bring their pixels back
  selected: 1,
  files: {}, // base64 by name: masks and images that layers and settings name
  map: new LayerMap(256, 256),
  grid: [["", ""], ["", ""]],
  lost: false, // whether files were too large for the browser to keep them over a reload
  run: null, // id of the run that is shown
};

export const colour = (value) => state.about.colours[(value - 1) % state.about.colours.length];
export const layer = (value = state.selected) => state.layers.find((one) => one.value === value);

export function newLayer(phrase = "", more = {}) {
  const used = new Set([...state.layers.map((one) => one.value), ...Object.keys(state.gone).map(Number)]);
  let value = 1;
  while (used.has(value)) value++;
  const made = { value, phrase, strength: 1, negative: "", visible: true, place: null, more: {}, ...more };
  state.layers.push(made);
  return made;
}

// Takes a layer away, and its pixels by `erase`; undo brings back both.
export function dropLayer(one, erase) {
  const kept = { ...one };
  erase();
  state.layers = state.layers.filter((other) => other !== one);
  state.gone[one.value] = kept;
  if (!layer() && state.layers.length) state.selected = state.layers[0].value;
}

// Brings back the removed layers whose pixels are on the map again; says whether there were any.
export function returnLayers() {
  const counts = state.map.counts();
  const back = Object.values(state.gone).filter((one) => counts[one.value]);
  for (const one of back) {
    state.layers.push(one);
    delete state.gone[one.value];
  }
  return back.length > 0;
}

// A browser keeps a few megabytes: of more files those that nothing names go, then all.
export function keepDraft() {
  const { model, prompt, negative, sample, plugins, control, layers, selected, files, grid, run, map } = state;
  const painted = { width: map.width, height: map.height, runs: packed(map.values) };
  const draft = { model, prompt, negative, sample, plugins, control, layers, selected, grid, run, painted };
  const kept = [{ files, lost: false }, { files: namedFiles(), lost: true }, { files: {}, lost: true }];
  if (!kept.some((own) => stored({ ...draft, ...own }))) sessionStorage.removeItem(DRAFT); // better none than an old one
}

export const keepSoon = later(250, keepDraft);

function stored(draft) {
  try {
    sessionStorage.setItem(DRAFT, JSON.stringify(draft));
    return true;
  } catch {
    return false;
  }
}

// Keeps a file of the user's, and says by which name.
export async function addFile(file) {
  return keepFile(file.name, toBase64(new Uint8Array(await file.arrayBuffer())));
}

export function keepFile(name, data) {
  let own = name;
  while (own in state.files && state.files[own] !== data) own = `again-${own}`;
  state.files[own] = data;
  return own;
}

export function restoreDraft() {
  const text = sessionStorage.getItem(DRAFT);
  if (!text) return false;
  const { painted, ...draft } = JSON.parse(text);
  Object.assign(state, draft);
  for (const one of state.layers) if (one.place?.mask && !(one.place.mask in state.files)) one.place = null;
  state.map.resize(painted.width, painted.height);
  unpacked(painted.runs, state.map.values);
  return true;
}

// By layer, whether it is a box or a file; a step of undo brings it back with the pixels.
export const places = () => new Map(state.layers.map((one) => [one.value, one.place]));

export function putPlaces(kept) {
  for (const one of state.layers) one.place = kept.get(one.value) ?? null;
}

// A layer that was a box or a file stays one until its pixels change.
export function looseChanged(before) {
  for (const one of state.layers) {
    if (!one.place) continue;
    const { values } = state.map;
    for (let i = 0; i < values.length; i++) {
      if (before[i] !== values[i] && (before[i] === one.value || values[i] === one.value)) {
        one.place = null;
        break;
      }
    }
  }
}

// Layers that are drawn: visible, and somewhere.
export function drawnLayers() {
  const counts = state.map.counts();
  return state.layers.filter((one) => one.visible && (one.place || counts[one.value]));
}

function segment(one) {
  const words = { phrase: one.phrase, strength: one.strength, ...one.more };
  if (one.negative) words.negative = one.negative;
  return { ...words, ...(one.place ?? { value: one.value }) };
}

export async function layoutFiles() {
  const layers = drawnLayers();
  const painted = layers.some((one) => !one.place);
  const layout = { prompt: state.prompt, negative: state.negative };
  const files = {};
  if (painted) {
    const { width, height, values } = state.map;
    layout.map = "map.png";
    while (layout.map in state.files) layout.map = `painted-${layout.map}`;
    files[layout.map] = toBase64(await greyPng(width, height, values));
  }
  layout.segments = layers.map(segment);
  for (const one of layers) if (one.place?.mask) files[one.place.mask] = state.files[one.place.mask];
  return { layout, files, any: layers.length > 0 };
}

// The files that settings, options of plugins and controls name.
function settingsFiles() {
  const { image, map, labels } = state.sample;
  const named = [image, map, labels, ...state.control.map((one) => one.image), ...state.plugins.flatMap((one) => Object.values(one.options).flat())];
  return chosenFiles(named);
}

const chosenFiles = (names) => Object.fromEntries(names.filter((name) => name in state.files).map((name) => [name, state.files[name]]));
const namedFiles = () => ({ ...settingsFiles(), ...chosenFiles(state.layers.map((one) => one.place?.mask)) });

// The request for what the user asks: run.json's tables with the files that they name.
export async function request() {
  const { layout, files, any } = await layoutFiles();
  const sample = { model: state.model, prompt: state.prompt, negative: state.negative, ...state.sample };
  if (any) {
    files["layout.json"] = toBase64(new TextEncoder().encode(JSON.stringify(layout)));
    sample.layout = "layout.json";
  }
  Object.assign(files, settingsFiles());
  const plugin = Object.fromEntries(state.plugins.map((one) => [one.name, one.options]));
  const grid = state.grid.filter(([name, values]) => name && values.trim()).map(([name, values]) => `${name}=${values}`);
  return { format: 1, sample, plugin, control: state.control, files, grid };
}

// Takes over what POST /api/open found in files; a layout leaves the settings as they are.
export function adopt(found) {
  const map = state.map;
  map.resize(found.size[1], found.size[0]);
  map.values = fromBase64(found.map);
  const { prompt, negative, model, ...sample } = found.sample;
  state.prompt = prompt ?? "";
  state.negative = negative ?? "";
  if (found.kind === "run") {
    if (model) state.model = model;
    if (Array.isArray(sample.seeds)) sample.seeds = seedsText(sample.seeds);
    state.sample = sample;
    state.plugins = Object.entries(found.plugin).map(([name, options]) => ({ name, options }));
    state.control = found.control;
    state.grid = [0, 1].map((i) => found.grid[i] ?? ["", ""]);
    state.files = {};
  }
  state.files = { ...state.files, ...found.files };
  state.layers = [];
  state.gone = {};
  for (const { phrase, strength, negative, box, mask, ...more } of found.segments) {
    const place = box ? { box } : mask ? { mask } : null;
    newLayer(phrase, { strength: strength ?? 1, negative: negative ?? "", place, more });
  }
  state.selected = state.layers[0]?.value ?? 1;
}

export function seedsText(seeds) {
  const last = seeds[0] + seeds.length - 1;
  const whole = seeds.length > 1 && seeds.every((seed, i) => seed === seeds[0] + i);
  return whole ? `${seeds[0]}-${last}` : seeds.join(",");
}
