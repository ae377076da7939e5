// The page: puts its parts together.

import { api } from "./api.js";
import { fromBase64, toBase64 } from "./bytes.js";
import { Easel } from "./canvas.js";
import { $, el, numberOf, saveFile, say } from "./dom.js";
import { showControls } from "./controls.js";
import { compare, showRuns } from "./gallery.js";
import { showPlugins, showSampling } from "./knobs.js";
import { askTokens, bindLayers, phrasesFit, showAsk, showCoverage, showLayers, showSelected } from "./layers.js";
import { RunView } from "./run.js";
import { addFile, adopt, keepDraft, keepFile, layer, layoutFiles, newLayer, request, restoreDraft, state } from "./state.js";

const EVERY = 2000; // milliseconds between two looks at the list of runs

let easel, view, runs = [], last = 0, drawing = false;

function begin() {
  state.model = state.about.models[0];
  const names = state.about.plugins.map((one) => one.name);
  state.plugins = ["zest", "pww"].filter((name) => names.includes(name)).map((name) => ({ name, options: {} }));
}

// What the model draws for who asks for nothing.
async function openExample() {
  const files = state.facts.example;
  if ("layout.json" in files) adopt(await api.open({ files, main: "layout.json", size: state.facts.paint }));
}

async function chooseModel(name) {
  state.facts = await api.model(name);
  state.model = name;
  $("model").value = name;
}

function showAll() {
  easel.reset();
  showAsk(easel);
  showSettings();
}

function showSettings() {
  showPlugins();
  showSampling();
  showControls(showSettings);
}

function under(source) {
  $("under").src = source ?? "";
  $("under").hidden = !source;
  if (source) $("stage").scrollIntoView({ block: "nearest" });
}

function fail(error) {
  $("ask-error").textContent = error.message ?? String(error);
  $("ask-error").hidden = false;
}

// A field says that it has changed when it is left.
function settle() {
  const field = document.activeElement;
  if (!field?.matches?.("input, select, textarea")) return;
  field.blur();
  field.focus();
}

// One run, however often it is asked for before the server has it.
async function draw() {
  if (drawing) return;
  drawing = $("draw").disabled = true;
  $("ask-error").hidden = true;
  settle();
  try {
    const trouble = await askTokens();
    if (trouble) throw trouble;
    if (!phrasesFit() && !state.sample.append_phrases) throw new Error("A layer's phrase is not in the prompt; see the layers.");
    const run = await api.draw(await request());
    await view.show(run.id);
    $("result").scrollIntoView({ block: "nearest", behavior: "smooth" });
    say(`Run ${numberOf(run.id)} is waiting`);
  } catch (error) {
    fail(error);
  } finally {
    drawing = $("draw").disabled = false;
  }
  refresh();
}

async function refresh() {
  const own = ++last;
  try {
    const found = (await api.runs()).runs;
    if (own !== last) return;
    runs = found;
    if (!view.source) $("banner").hidden = true;
  } catch (error) {
    if (own !== last) return;
    $("banner").textContent = error.message;
    $("banner").hidden = false;
    return;
  }
  const busy = runs.filter((run) => !["finished", "stopped", "failed"].includes(run.state));
  $("queue").textContent = busy.length > 1 ? `${busy.length} runs in the queue` : "";
  showRuns(runs, (id) => view.show(id).then(() => $("result").scrollIntoView({ block: "nearest" })).catch(fail));
}

async function openFiles(list) {
  $("ask-error").hidden = true;
  const given = [...list];
  const files = {};
  const main = (given.find((file) => file.name.endsWith(".json")) ?? given[0])?.name;
  if (!main) return;
  try {
    for (const file of given) files[file.name] = toBase64(await bytesOf(file));
    const found = await api.open({ files, main, size: [state.map.height, state.map.width] });
    if (found.kind === "mask") {
      openMask(main, files[main], found);
      if (given.length > 1) fail(`Masks are opened one by one, each for the layer at hand; this is ${main}.`);
      return;
    }
    await take(found);
    say(found.kind === "run" ? "Everything of that run is restored" : "The layout is opened");
  } catch (error) {
    fail(error);
  }
}

async function bytesOf(file) {
  const data = await file.arrayBuffer().catch(() => null); // a folder has none
  if (!data) throw new Error(`${file.name} cannot be read; open files, not folders.`);
  return new Uint8Array(data);
}

// A mask goes to the layer at hand; it stays the file that it is until it is painted on.
function openMask(name, data, found) {
  const one = layer() ?? newLayer("");
  const inside = fromBase64(found.map);
  easel.change((map) => {
    for (let i = 0; i < inside.length; i++)
      if (inside[i]) map.values[i] = one.value;
      else if (map.values[i] === one.value) map.values[i] = 0;
  });
  const own = keepFile(name, data);
  one.place = { mask: own };
  showLayers(easel);
  askTokens();
  showSettings();
  keepDraft();
  say(`The mask is on the layer ${one.phrase}`);
}

// An image that the model, an option of a plugin or a control is to follow, or a label map.
async function addImage(file) {
  if (!file) return;
  const name = await addFile(file);
  if (state.facts.reads_image) state.sample.image = name;
  showSettings();
  keepDraft();
  say(`${name} is added`);
}

async function take(found) {
  const model = state.model;
  adopt(found);
  if (state.model !== model) await chooseModel(state.model);
  under(null);
  showAll();
  keepDraft();
  if (found.notes.length) fail(found.notes.join("; "));
}

async function restore(id) {
  try {
    const run = await api.run(id);
    await take(await api.open({ body: run.body, size: [state.map.height, state.map.width] }));
    say(`The settings of run ${numberOf(id)} are restored`);
  } catch (error) {
    fail(error);
  }
}

async function saveLayout() {
  const { layout, files } = await layoutFiles();
  saveFile("layout.json", [JSON.stringify(layout, null, 1)], "application/json");
  for (const [name, data] of Object.entries(files)) saveFile(name, [fromBase64(data)], "image/png");
}

function listen() {
  $("draw").addEventListener("click", draw);
  $("compare").addEventListener("click", () => compare().catch(fail));
  $("save-layout").addEventListener("click", () => saveLayout().catch(fail));
  $("open").addEventListener("change", (event) => openFiles(event.target.files).finally(() => (event.target.value = "")));
  $("add-file").addEventListener("change", (event) => addImage(event.target.files[0]).catch(fail));
  $("model").addEventListener("change", async (event) => {
    try {
      await chooseModel(event.target.value);
      if (state.map.values.every((value) => !value)) state.map.resize(...state.facts.paint.toReversed());
      showAll();
      keepDraft();
    } catch (error) {
      fail(error);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) draw();
  });
  for (const kind of ["dragenter", "dragover"])
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.add("dropping");
    });
  document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    openFiles(event.dataTransfer.files);
  });
  window.addEventListener("pagehide", keepDraft);
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
}

async function start() {
  state.about = await api.about();
  const old = restoreDraft();
  if (!old || !state.about.models.includes(state.model)) begin();
  $("model").replaceChildren(...state.about.models.map((name) => el("option", { value: name }, name)));
  await chooseModel(state.model);
  if (!old) {
    state.map.resize(...state.facts.paint.toReversed());
    await openExample();
  }
  easel = new Easel(
    () => {
      showCoverage();
      showSelected();
    },
    () => showAsk(easel),
  );
  view = new RunView({ changed: refresh, under, restore });
  bindLayers(easel);
  listen();
  showAll();
  if (old && state.lost) fail("Not all files were kept, as they were too large for the browser; add them again.");
  if (state.run) await view.show(state.run).catch(() => (state.run = null));
  await refresh();
  setInterval(() => document.hidden || refresh(), EVERY);
  document.documentElement.dataset.ready = "yes";
}

window.guidekit = { state }; // for tests, and for who looks under the hood
start().catch(fail);
