// Live curves of a run: energy, and update over the model's output, by plugin and batch.

import { $, el, svg, number } from "./dom.js";

const [W, H, LEFT, BOTTOM] = [300, 130, 44, 18];
const KINDS = { energy: "Energy", update_ratio: "Update over output" };

export class Curves {
  constructor(colours) {
    this.colours = colours;
    this.clear();
  }

  clear() {
    this.lines = new Map(); // plugin, batch and cell to their points
    this.n = 1;
    $("curves").replaceChildren();
  }

  add({ rows, n, cell, seeds }) {
    this.n = Math.max(this.n, n);
    for (const row of rows) {
      const key = `${row.plugin} ${cell} ${seeds[0]}`;
      if (!this.lines.has(key)) this.lines.set(key, { plugin: row.plugin, points: [] });
      this.lines.get(key).points.push(row);
    }
    if (rows.length && !this.asked) this.asked = requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.asked = null;
    $("curves").replaceChildren(...Object.keys(KINDS).map((kind) => this.#curve(kind)).filter(Boolean));
  }

  #curve(kind) {
    const lines = [...this.lines.values()];
    const values = lines.flatMap((line) => line.points.map((row) => row[kind])).filter((v) => v !== null);
    if (!values.length) return null;
    const low = kind === "energy" ? Math.min(...values) : 0;
    const high = Math.max(...values);
    const plugins = [...new Set(lines.map((line) => line.plugin))];
    const x = (step) => LEFT + (step / Math.max(1, this.n - 1)) * (W - LEFT - 6);
    const y = (value) => 8 + ((high - value) / (high - low || 1)) * (H - BOTTOM - 12);
    const drawn = lines.map(({ plugin, points }) =>
      svg("polyline", {
        points: points.filter((row) => row[kind] !== null).map((row) => `${x(row.step).toFixed(1)},${y(row[kind]).toFixed(1)}`).join(" "),
        stroke: this.colours[(plugins.indexOf(plugin) + 1) % this.colours.length],
      }));
    const text = (left, top, anchor, words) => {
      const made = svg("text", { x: left, y: top, "text-anchor": anchor });
      made.textContent = words;
      return made;
    };
    const base = H - BOTTOM;
    const image = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${KINDS[kind]} from ${number(low)} to ${number(high)}` },
      svg("line", { class: "axis-line", x1: LEFT, x2: W - 6, y1: base, y2: base }),
      text(LEFT - 6, 14, "end", number(high)), text(LEFT - 6, base, "end", number(low)),
      text(LEFT, H - 4, "start", "step 1"), text(W - 6, H - 4, "end", `step ${this.n}`), ...drawn);
    const keys = plugins.flatMap((plugin, i) => {
      const key = el("span", { className: "key" });
      key.style.background = this.colours[(i + 1) % this.colours.length];
      return [key, plugin];
    });
    return el("figure", { className: "curve" }, el("figcaption", {}, KINDS[kind], ...keys), image);
  }
}
