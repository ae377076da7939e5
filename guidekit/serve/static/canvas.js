// The canvas: shows the map over an image, and paints by mouse, pen, finger or keys.

import { $, say } from "./dom.js";
import { state, colour, layer, keepSoon, looseChanged, places, putPlaces, returnLayers } from "./state.js";

const SHAPES = ["box", "ellipse"];
const KEYS = { b: "brush", e: "erase", r: "box", o: "ellipse", f: "fill" };

export class Easel {
  // changed: after every change of the map; returned: after undo brought removed layers back.
  constructor(changed, returned) {
    Object.assign(this, { changed, returned });
    this.tool = "brush";
    this.size = 28;
    this.opacity = 0.6;
    this.cursor = null; // of the keyboard, in pixels of the map
    this.from = null; // where a stroke or a shape began
    this.canvas = $("canvas");
    this.guide = $("guide");
    this.#listen();
  }

  // After the map was exchanged or its size has changed.
  reset() {
    const { width, height } = state.map;
    this.canvas.width = width;
    this.canvas.height = height;
    $("stage").style.aspectRatio = `${width} / ${height}`;
    $("size").max = Math.round(Math.max(width, height) / 2);
    this.draw();
  }

  draw() {
    const { width, height, values } = state.map;
    const colours = new Uint32Array(256);
    const alpha = Math.round(this.opacity * 255);
    for (const one of state.layers) {
      const rgb = parseInt(colour(one.value).slice(1), 16);
      const bgr = ((rgb & 255) << 16) | (rgb & 0xff00) | (rgb >> 16);
      if (one.visible) colours[one.value] = ((alpha << 24) | bgr) >>> 0;
    }
    const image = new ImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let i = 0; i < values.length; i++) pixels[i] = colours[values[i]];
    this.canvas.getContext("2d").putImageData(image, 0, 0);
    $("undo").disabled = !state.map.past.length;
    $("redo").disabled = !state.map.future.length;
  }

  choose(tool) {
    this.tool = tool;
    for (const button of document.querySelectorAll("[data-tool]")) {
      const on = button.dataset.tool === tool;
      button.setAttribute("aria-checked", on);
      button.tabIndex = on ? 0 : -1;
    }
  }

  resize(size) {
    this.size = Math.max(1, Math.min(+$("size").max, size));
    $("size").value = this.size;
    $("size-out").textContent = this.size;
  }

  change(act) {
    state.map.mark(places());
    const before = state.map.values.slice();
    act(state.map);
    looseChanged(before);
    this.#settle();
  }

  undo(again = false) {
    const back = again ? state.map.redo(places()) : state.map.undo(places());
    if (back) {
      putPlaces(back);
      this.#settle();
    }
    if (returnLayers()) this.returned();
    say(again ? "Done again" : "Undone");
  }

  #settle() {
    this.draw();
    this.changed();
    keepSoon();
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) * state.map.width) / box.width,
      y: ((event.clientY - box.top) * state.map.height) / box.height,
    };
  }

  get #value() {
    return this.tool === "erase" ? 0 : state.selected;
  }

  #begin(place) {
    if (this.#value && !layer()) return say("Add a layer first");
    if (this.#value && !layer().visible) return say("The layer is hidden; show it to paint on it");
    state.map.mark(places());
    this.before = state.map.values.slice();
    this.from = place;
    if (SHAPES.includes(this.tool)) return this.#outline(place, place);
    if (this.tool === "fill") {
      state.map.fill(place, this.#value);
      return this.#end(place);
    }
    state.map.stroke(place, place, this.size, this.#value);
    this.draw();
  }

  #move(place) {
    if (!this.from) return;
    if (SHAPES.includes(this.tool)) return this.#outline(this.from, place);
    state.map.stroke(this.from, place, this.size, this.#value);
    this.from = place;
    this.draw();
  }

  #end(place) {
    if (!this.from) return;
    if (SHAPES.includes(this.tool)) state.map[this.tool](this.from, place, this.#value);
    this.from = null;
    this.#outline(null);
    looseChanged(this.before);
    this.#settle();
  }

  #cancel() {
    if (!this.from) return;
    this.from = null;
    state.map.undo(places());
    state.map.future = [];
    this.#outline(null);
    this.draw();
  }

  // A shape while it is drawn, the ring of the brush, or the cross of the keyboard.
  #outline(a, b, ring = false) {
    const box = this.canvas.getBoundingClientRect();
    const scale = window.devicePixelRatio || 1;
    const guide = this.guide;
    guide.width = Math.round(box.width * scale);
    guide.height = Math.round(box.height * scale);
    if (!a) return;
    const ink = guide.getContext("2d");
    const fx = guide.width / state.map.width, fy = guide.height / state.map.height;
    ink.beginPath();
    if (ring) ink.ellipse(a.x * fx, a.y * fy, (this.size / 2) * fx, (this.size / 2) * fy, 0, 0, 7);
    else if (this.tool === "box") ink.rect(a.x * fx, a.y * fy, (b.x - a.x) * fx, (b.y - a.y) * fy);
    else ink.ellipse(((a.x + b.x) / 2) * fx, ((a.y + b.y) / 2) * fy, (Math.abs(b.x - a.x) / 2) * fx, (Math.abs(b.y - a.y) / 2) * fy, 0, 0, 7);
    for (const [style, width] of [["#ffffffcc", 3], ["#1f2321", 1.2]]) {
      ink.strokeStyle = style;
      ink.lineWidth = width * scale;
      ink.stroke();
    }
  }

  #ring(place) {
    if (this.from && SHAPES.includes(this.tool)) return;
    if (["brush", "erase"].includes(this.tool)) this.#outline(place, place, true);
    else this.#outline(null);
  }

  #listen() {
    const canvas = this.canvas;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      canvas.setPointerCapture(event.pointerId);
      this.cursor = null;
      this.#begin(this.#place(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      const all = event.getCoalescedEvents?.() ?? [];
      for (const one of all.length ? all : [event]) this.#move(this.#place(one));
      this.#ring(this.#place(event));
    });
    canvas.addEventListener("pointerup", (event) => this.#end(this.#place(event)));
    canvas.addEventListener("pointercancel", () => this.#cancel());
    canvas.addEventListener("pointerleave", () => this.from || this.#outline(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#outline(null));
    document.addEventListener("keydown", (event) => this.#shortcut(event));
    const tools = [...document.querySelectorAll("[data-tool]")];
    for (const button of tools) {
      button.addEventListener("click", () => this.choose(button.dataset.tool));
      button.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const next = tools[(tools.indexOf(button) + step + tools.length) % tools.length];
        this.choose(next.dataset.tool);
        next.focus();
      });
    }
    $("size").addEventListener("input", () => this.resize(+$("size").value));
    $("opacity").addEventListener("input", () => {
      this.opacity = $("opacity").value / 100;
      this.draw();
    });
    $("undo").addEventListener("click", () => this.undo());
    $("redo").addEventListener("click", () => this.undo(true));
    $("clear").addEventListener("click", () => this.change((map) => {
      map.clear();
      for (const one of state.layers) one.place = null; // also of one that another hides
    }));
    this.choose(this.tool);
  }

  #key(event) {
    const by = event.shiftKey ? 16 : 4;
    const step = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] }[event.key];
    const { width, height } = state.map;
    this.cursor ??= { x: width / 2, y: height / 2 };
    if (step) {
      const clamp = (value, most) => Math.max(0.5, Math.min(most - 0.5, value));
      this.cursor = { x: clamp(this.cursor.x + step[0], width), y: clamp(this.cursor.y + step[1], height) };
      if (SHAPES.includes(this.tool) && this.from) this.#outline(this.from, this.cursor);
      else this.#outline(this.cursor, this.cursor, true);
      const here = layer(state.map.at(this.cursor.x, this.cursor.y));
      say(`${Math.round((100 * this.cursor.x) / width)} % across, ${Math.round((100 * this.cursor.y) / height)} % down, ${here ? here.phrase : "nothing"}`);
    } else if (event.key === " " || event.key === "Enter") {
      if (event.ctrlKey || event.metaKey) return;
      if (SHAPES.includes(this.tool) && this.from) this.#end(this.cursor);
      else {
        this.#begin(this.cursor);
        if (!SHAPES.includes(this.tool)) this.#end(this.cursor);
      }
      say(SHAPES.includes(this.tool) && this.from ? "Corner set; move and press again" : "Painted");
    } else if (event.key === "Escape") this.#cancel();
    else return;
    event.preventDefault();
  }

  #shortcut(event) {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "range";
    const command = event.ctrlKey || event.metaKey;
    if (typing || event.altKey) return;
    if (command && event.key.toLowerCase() === "z") this.undo(event.shiftKey);
    else if (command && event.key.toLowerCase() === "y") this.undo(true);
    else if (command) return;
    else if (event.key in KEYS) this.choose(KEYS[event.key]);
    else if (event.key === "[" || event.key === "]") this.resize(this.size + (event.key === "]" ? 4 : -4));
    else if (/^[1-9]$/.test(event.key) && state.layers[event.key - 1]) {
      state.selected = state.layers[event.key - 1].value;
      say(`Layer ${layer().phrase}`);
      this.changed();
    } else return;
    event.preventDefault();
  }
}
