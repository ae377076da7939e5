// The run that is shown: followed while it is drawn, with its images, attention and curves.

import { api } from "./api.js";
import { Curves } from "./curves.js";
import { $, el, numberOf, say } from "./dom.js";
import { state, keepDraft } from "./state.js";

const ENDED = ["finished", "stopped", "failed"];
const STATES = { queued: "waiting", loading: "loading the model", drawing: "drawing", finished: "finished", stopped: "stopped", failed: "failed" };

export class RunView {
  constructor({ changed, under, restore }) {
    Object.assign(this, { changed, under });
    this.curves = new Curves(state.about.colours);
    this.source = null;
    $("stop").addEventListener("click", () => this.stop());
    $("restore").addEventListener("click", () => this.run && restore(this.run.id));
    $("heat-layer").addEventListener("change", () => this.#heat());
    $("heat-opacity").addEventListener("input", () => this.#heat());
  }

  // Shows a run, and follows it until it has ended.
  async show(id) {
    this.leave();
    const asked = (this.asked = id);
    const run = await api.run(id);
    if (asked !== this.asked) return; // another run was chosen meanwhile
    this.leave();
    this.run = run;
    state.run = id;
    keepDraft();
    Object.assign(this, { heats: {}, phrases: [], fraction: 0, where: "" });
    $("result").hidden = false;
    $("run-error").hidden = true;
    $("notes").replaceChildren();
    $("downloads").replaceChildren();
    $("heatbar").hidden = true;
    this.#frames();
    this.#state(run.state, run.error);
    if (ENDED.includes(run.state)) this.#finish();
    this.#follow(id);
  }

  leave() {
    this.source?.close();
    this.source = null;
  }

  async stop() {
    if (!this.run) return;
    $("stop").disabled = true;
    try {
      await api.stop(this.run.id);
    } catch (error) {
      $("run-error").textContent = error.message;
      $("run-error").hidden = false;
    } finally {
      $("stop").disabled = false;
    }
    this.changed();
  }

  #follow(id) {
    this.curves.clear(); // the stream begins with the first event
    const source = (this.source = api.events(id));
    const on = (kind, act) =>
      source.addEventListener(kind, (event) => source === this.source && act(JSON.parse(event.data)));
    source.onopen = () => ($("banner").hidden = true);
    source.onerror = () => {
      if (source !== this.source || this.ended) return;
      $("banner").textContent = "The connection is lost. Trying again; the run goes on.";
      $("banner").hidden = false;
      if (source.readyState === EventSource.CLOSED) setTimeout(() => source === this.source && this.#again(id), 1500);
    };
    on("state", (data) => {
      if (data.tokens) this.phrases = data.tokens.map((one) => one.phrase);
      this.#state(data.state, data.error);
      if (ENDED.includes(data.state)) {
        this.leave();
        this.#ended(id);
      }
    });
    on("step", (data) => {
      this.fraction = data.total ? data.done / data.total : 0;
      const cells = this.cells.length;
      const index = Math.max(0, this.cells.indexOf(data.cell));
      $("progress").value = (index + this.fraction) / cells;
      this.where = `step ${data.step + 1} of ${data.n}${data.guided || !this.run.plugins.length ? "" : ", unguided"}${cells > 1 ? `, cell ${index + 1} of ${cells}` : ""}`;
      this.#state("drawing");
      this.curves.add(data);
    });
    on("preview", (data) => this.#preview(data));
    on("maps", (data) => {
      data.maps.forEach((maps, i) => (this.heats[`${data.cell} ${data.seeds[i]}`] = maps));
      this.#heat();
    });
  }

  async #again(id) {
    if (this.source?.readyState !== EventSource.CLOSED) return; // it came back, or another run is shown
    if (await this.#asked(id, () => this.#again(id))) this.#follow(id);
  }

  get ended() {
    return ENDED.includes(this.run?.state);
  }

  async #ended(id) {
    const run = await this.#asked(id, () => this.#ended(id));
    if (!run || this.run.id !== id) return;
    this.run = run;
    this.#finish();
    this.changed();
  }

  // A run of the server; null if it has none such, or does not answer: then `again` is called later.
  async #asked(id, again) {
    try {
      return await api.run(id);
    } catch (error) {
      if (error.status === 404) {
        this.leave();
        $("run-error").textContent = "The server was started anew and has forgotten this run. Its files are still in its folder.";
        $("run-error").hidden = false; // the banner goes once the server answers
      } else setTimeout(() => this.run?.id === id && again(), 1500);
      return null;
    }
  }

  #state(name, error) {
    const before = this.run.state;
    this.run.state = name;
    $("run-state").textContent = name === "drawing" && this.where ? this.where : STATES[name];
    $("stop").hidden = ENDED.includes(name);
    $("run-error").hidden = !error;
    $("run-error").textContent = error ?? "";
    $("progress").classList.toggle("done", ENDED.includes(name));
    if (before !== name) {
      say(`Run ${numberOf(this.run.id)} ${STATES[name]}`);
      this.changed();
    }
  }

  // Frames to be filled: a pair a seed, or a table of cells.
  #frames() {
    const { run } = this;
    this.slots = {};
    this.cells = [""];
    $("result-title").textContent = `Run ${numberOf(run.id)}`;
    if (run.grid.length) return $("images").replaceChildren(this.#table());
    $("images").replaceChildren(
      ...run.seeds.map((seed) => {
        const shots = [this.#shot("", seed, true, run.compare ? "guided" : "")];
        if (run.compare) shots.push(this.#shot("", seed, false, "unguided"));
        const pair = el("div", { className: run.compare ? "pair" : "pair single" }, ...shots);
        return el("figure", { className: "seed" }, el("figcaption", {}, `seed ${seed}`), pair);
      }));
  }

  #table() {
    const [first, second] = this.run.grid;
    const rows = second ? first[1] : [null];
    const columns = second ? second[1] : first[1];
    this.cells = rows.flatMap((_, i) => columns.map((_, j) => `${i}-${j}`));
    const head = el("tr", {}, second ? el("td") : null, ...columns.map((value) => el("th", { scope: "col" }, `${(second ?? first)[0]} ${value}`)));
    const body = rows.map((value, i) =>
      el("tr", {}, value === null ? null : el("th", { scope: "row" }, `${first[0]} ${value}`),
        ...columns.map((_, j) => el("td", {}, el("div", { className: "cellimages" }, ...this.run.seeds.map((seed) => this.#shot(`${i}-${j}`, seed, true, "")))))));
    return el("div", { className: "scroll" }, el("table", { className: "sheet" }, el("thead", {}, head), el("tbody", {}, ...body)));
  }

  #shot(cell, seed, guided, caption) {
    const words = `${guided ? "" : "unguided "}image of seed ${seed}${cell ? `, cell ${cell}` : ""}`;
    const image = el("img", { alt: words, hidden: true });
    const heat = el("img", { className: "heat", alt: "", hidden: true });
    const frame = el("span", { className: "frame waiting" }, image, heat);
    const button = el("button", { type: "button", className: "shot", title: "Paint over this image", "aria-label": `Paint over the ${words}`,
      onclick: () => image.src && this.under(image.src) }, frame, caption ? el("span", {}, caption) : null);
    this.slots[`${cell} ${seed} ${guided}`] = { image, heat, frame };
    return button;
  }

  #fill(cell, seed, guided, source, rough) {
    const slot = this.slots[`${cell} ${seed} ${guided}`];
    if (!slot) return;
    slot.image.src = source;
    slot.image.hidden = false;
    slot.image.classList.toggle("rough", rough);
    slot.frame.classList.remove("waiting");
  }

  #preview({ cell, seeds, guided, images }) {
    const own = guided || !this.run.plugins.length;
    seeds.forEach((seed, i) => images[i] && this.#fill(cell, seed, own, images[i], true));
  }

  #heat() {
    const select = $("heat-layer");
    const kinds = Object.values(this.heats)[0]?.length ?? 0;
    $("heatbar").hidden = !kinds;
    const names = ["none", ...Array.from({ length: kinds }, (_, i) => this.phrases[i] ?? `segment ${i}`)];
    if ([...select.options].map((one) => one.text).join("\n") !== names.join("\n")) {
      select.replaceChildren(...names.map((name, i) => el("option", { value: i - 1 }, name)));
    }
    const index = +select.value;
    for (const [key, { heat }] of Object.entries(this.slots)) {
      const source = key.endsWith("true") && this.heats[key.replace(/ true$/, "")]?.[index];
      heat.hidden = !source || index < 0;
      if (source) heat.src = source;
      heat.style.opacity = $("heat-opacity").value / 100;
    }
  }

  // The files of a run that has ended take the place of its previews.
  #finish() {
    const { run } = this;
    const there = new Set(run.files);
    for (const key of Object.keys(this.slots)) {
      const [cell, seed, guided] = key.split(" ");
      const path = `${cell ? `${cell}/` : ""}${guided === "true" ? "" : "unguided/"}${seed}.png`;
      if (there.has(path)) this.#fill(cell, seed, guided === "true", api.file(run.id, path), false);
    }
    const record = Object.values(run.records)[0]?.record;
    if (record && !this.phrases.length) this.phrases = record.tokens.map((one) => one.phrase);
    $("notes").replaceChildren(...(record?.notes ?? []).map((note) => el("p", { className: "note" }, note)));
    this.#downloads(there);
  }

  #downloads(there) {
    const { run } = this;
    const made = run.grid.length ? this.#cellFiles(there) : this.#runFiles(there, "");
    for (const [name, kind] of [["layout.json", "application/json"], ["map.png", "image/png"]])
      if (run.body.files[name]) made.push(el("a", { href: `data:${kind};base64,${run.body.files[name]}`, download: name }, name));
    const command = this.#command(there);
    if (command) made.push(el("div", { className: "command" }, el("code", { tabIndex: 0 }, command), copier(command)));
    $("downloads").replaceChildren(...made);
  }

  // Links to what a run wrote into its folder, or into a cell's folder of a grid.
  #runFiles(there, cell) {
    const { run } = this;
    const at = cell && `${cell}/`;
    const made = [];
    const link = (name, text = name, more = { download: `${run.id}-${cell && `${cell}-`}${name}` }) => {
      if (there.has(at + name)) made.push(el("a", { href: api.file(run.id, at + name), ...more }, text));
    };
    for (const seed of run.seeds) link(`${seed}.png`);
    link("run.json");
    link("index.html", "Report", { target: "_blank" });
    return made;
  }

  #cellFiles(there) {
    const { run } = this;
    const sheet = there.has("sheet.png") ? [el("a", { href: api.file(run.id, "sheet.png"), download: `${run.id}-sheet.png` }, "sheet.png")] : [];
    const rows = this.cells.map((cell) => el("div", { className: "cellfiles" }, el("span", {}, cell), ...this.#runFiles(there, cell)));
    return [...sheet, el("details", {}, el("summary", {}, "Files of the cells"), ...rows)];
  }

  // The command that draws it again.
  #command(there) {
    const { run, cells } = this;
    const config = cells[0] ? `${cells[0]}/run.json` : "run.json";
    if (!run.folder || !there.has(config)) return null;
    const files = state.about.plugins.flatMap((one) => one.knobs.filter((knob) => knob.control === "file").map((knob) => `${one.name}.${knob.option}`));
    if (run.grid.some(([name]) => files.includes(name))) return null; // of the request, or of the server
    const axes = run.grid.map(([name, values]) => ` --grid ${quoted(`${name}=${values.join(",")}`)}`);
    return `guidekit sample --config ${quoted(`${run.folder}/${config}`)}${axes.join("")}`;
  }
}

// A word as a shell takes it.
const quoted = (word) => (/^[\w./=,-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`);

function copier(text) {
  const copy = el("button", { type: "button", className: "quiet", onclick: async () => {
    if (!navigator.clipboard) return selectText(copy.previousSibling); // a page without https has none
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  } }, "Copy");
  return copy;
}

function selectText(node) {
  getSelection().selectAllChildren(node);
  say("The command is selected; copy it with the keyboard");
}
