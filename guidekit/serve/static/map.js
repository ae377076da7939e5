// One integer map: 0 is nothing, 1 to 255 are layers. What is painted is exact to the pixel.
//
// A pixel belongs to a shape if its centre does. Places are in pixels of the map, and fractions
// count: the pixel (x, y) has its centre at (x + 0.5, y + 0.5).

const KEPT = 60; // steps of undo

export class LayerMap {
  constructor(width, height) {
    this.resize(width, height);
  }

  resize(width, height) {
    this.width = width;
    this.height = height;
    this.values = new Uint8Array(width * height);
    this.past = [];
    this.future = [];
  }

  // Keeps the map as it is now, to come back to, with what belongs to it.
  mark(note) {
    this.past.push({ values: this.values.slice(), note });
    if (this.past.length > KEPT) this.past.shift();
    this.future = [];
  }

  // Goes a step back, keeping the map as it is with its note; gives the note of that step, if any.
  undo(note) {
    return this.#swap(this.past, this.future, note);
  }

  redo(note) {
    return this.#swap(this.future, this.past, note);
  }

  #swap(from, to, note) {
    if (!from.length) return null;
    to.push({ values: this.values, note });
    const back = from.pop();
    this.values = back.values;
    return back.note;
  }

  at(x, y) {
    const inside = x >= 0 && y >= 0 && x < this.width && y < this.height;
    return inside ? this.values[Math.floor(y) * this.width + Math.floor(x)] : 0;
  }

  // Pixels whose centre lies within half the size of the line from a to b; at least b's own.
  stroke(a, b, size, value) {
    const r = size / 2;
    const [dx, dy] = [b.x - a.x, b.y - a.y];
    const length = dx * dx + dy * dy;
    this.#each(Math.min(a.x, b.x) - r, Math.min(a.y, b.y) - r, Math.max(a.x, b.x) + r, Math.max(a.y, b.y) + r, (x, y) => {
      const [px, py] = [x + 0.5 - a.x, y + 0.5 - a.y];
      const t = length ? Math.min(1, Math.max(0, (px * dx + py * dy) / length)) : 0;
      return (px - t * dx) ** 2 + (py - t * dy) ** 2 <= r * r;
    }, value);
    this.#each(b.x, b.y, b.x, b.y, () => true, value);
  }

  box(a, b, value) {
    const [left, right] = [Math.min(a.x, b.x), Math.max(a.x, b.x)];
    const [top, bottom] = [Math.min(a.y, b.y), Math.max(a.y, b.y)];
    const inside = (x, y) => x + 0.5 >= left && x + 0.5 <= right && y + 0.5 >= top && y + 0.5 <= bottom;
    this.#each(left, top, right, bottom, inside, value);
  }

  ellipse(a, b, value) {
    const [cx, cy] = [(a.x + b.x) / 2, (a.y + b.y) / 2];
    const [rx, ry] = [Math.abs(b.x - a.x) / 2, Math.abs(b.y - a.y) / 2];
    if (!rx || !ry) return;
    const inside = (x, y) => ((x + 0.5 - cx) / rx) ** 2 + ((y + 0.5 - cy) / ry) ** 2 <= 1;
    this.#each(cx - rx, cy - ry, cx + rx, cy + ry, inside, value);
  }

  // The pixels around a place that have its value and touch each other by their sides.
  fill(place, value) {
    const old = this.at(place.x, place.y);
    const [x0, y0] = [Math.floor(place.x), Math.floor(place.y)];
    if (old === value || x0 < 0 || y0 < 0 || x0 >= this.width || y0 >= this.height) return;
    const { width, height, values } = this;
    const left = [y0 * width + x0];
    while (left.length) {
      const i = left.pop();
      if (values[i] !== old) continue;
      values[i] = value;
      const x = i % width;
      if (x > 0) left.push(i - 1);
      if (x < width - 1) left.push(i + 1);
      if (i >= width) left.push(i - width);
      if (i < width * (height - 1)) left.push(i + width);
    }
  }

  clear() {
    this.values.fill(0);
  }

  // Pixels of each value.
  counts() {
    const found = new Uint32Array(256);
    for (const value of this.values) found[value]++;
    return found;
  }

  #each(left, top, right, bottom, inside, value) {
    const x0 = Math.max(0, Math.floor(left)), x1 = Math.min(this.width - 1, Math.floor(right));
    const y0 = Math.max(0, Math.floor(top)), y1 = Math.min(this.height - 1, Math.floor(bottom));
    for (let y = y0; y <= y1; y++)
      for (let x = x0; x <= x1; x++) if (inside(x, y)) this.values[y * this.width + x] = value;
  }
}
