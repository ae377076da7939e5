// The session's runs, and two of them side by side.

import { api } from "./api.js";
import { $, el } from "./dom.js";
import { state } from "./state.js";

const chosen = new Set();
let shown = "";

export function showRuns(runs, open) {
  const text = JSON.stringify([runs.map(({ id, state, position, done, total }) => [id, state, position, total ? Math.round((20 * done) / total) : 0]), [...chosen], state.run]);
  if (text === shown) return;
  shown = text;
  const focused = document.activeElement?.dataset?.run;
  $("no-runs").hidden = runs.length > 0;
  $("runs").replaceChildren(...runs.toReversed().map((run) => card(run, open)));
  if (focused) document.querySelector(`[data-run="${focused}"]`)?.focus();
  $("compare").disabled = chosen.size !== 2;
}

function card(run, open) {
  const frame = el("span", { className: "frame waiting" });
  if (["finished", "stopped"].includes(run.state) && run.folder) {
    const path = run.grid.length ? "sheet.png" : `${run.seeds[0]}.png`;
    const image = el("img", { src: api.file(run.id, path), alt: "", loading: "lazy", onload: () => frame.classList.remove("waiting"), onerror: () => image.remove() });
    frame.append(image);
  }
  const how = run.state === "queued" ? `waiting, number ${run.position}` : run.state === "drawing" && run.total ? `${Math.round((100 * run.done) / run.total)} %` : run.state === "finished" ? `${run.seconds.toFixed(1)} s` : run.state;
  const title = run.prompt || run.model;
  const button = el("button", { type: "button", "data-run": run.id, onclick: () => open(run.id), "aria-label": `Run ${run.id}, ${how}: ${title}` },
    frame, el("span", { className: "text" }, el("b", {}, title), el("span", {}, `${run.id} · ${run.plugins.join(", ") || "no plugin"} · ${how}`)));
  const box = el("input", { type: "checkbox", checked: chosen.has(run.id), disabled: run.state === "queued", onchange: () => {
    if (box.checked) chosen.add(run.id);
    else chosen.delete(run.id);
    $("compare").disabled = chosen.size !== 2;
  } });
  const made = el("li", { className: "card" }, button, el("label", {}, box, "compare"));
  made.classList.toggle("current", run.id === state.run);
  return made;
}

export async function compare() {
  const [a, b] = await Promise.all([...chosen].sort().map((id) => api.run(id)));
  const seeds = [...new Set([...a.seeds, ...b.seeds])];
  const rows = [el("h3", {}, `Run ${a.id}`), el("h3", {}, `Run ${b.id}`)];
  const shot = (run, path, words) =>
    el("figure", {}, run.files.includes(path) ? el("span", { className: "frame" }, el("img", { src: api.file(run.id, path), alt: words })) : el("span", { className: "frame waiting" }), el("figcaption", {}, words));
  for (const run of [a, b]) if (run.grid.length) rows.push(shot(run, "sheet.png", `sheet of run ${run.id}`));
  if (!a.grid.length && !b.grid.length)
    for (const seed of seeds) for (const run of [a, b]) rows.push(shot(run, `${seed}.png`, `seed ${seed}, run ${run.id}`));
  const changes = differences(flat(a), flat(b));
  const table = el("table", { className: "changes" }, el("thead", {}, el("tr", {}, ...["Setting", `Run ${a.id}`, `Run ${b.id}`].map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...changes.map(([name, x, y]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, x), el("td", {}, y)))));
  $("compared").replaceChildren(el("div", { className: "versus" }, ...rows), changes.length ? table : el("p", { className: "hint" }, "The two have the same settings."));
  $("comparison").showModal();
}

// The settings of a run by dotted names, as its run.json has them.
function flat(run) {
  const record = Object.values(run.records)[0] ?? { sample: run.body.sample, plugin: run.body.plugin, segment: [] };
  const found = {};
  const put = (name, value) => value !== null && value !== undefined && (found[name] = typeof value === "string" ? value : JSON.stringify(value));
  for (const [name, value] of Object.entries(record.sample)) put(name, value);
  for (const [name, options] of Object.entries(record.plugin)) for (const [option, value] of Object.entries(options)) put(`${name}.${option}`, value);
  record.segment.forEach((one) => put(`segment ${one.phrase}`, `${JSON.stringify(one.box ?? one.mask)}, strength ${one.strength}`));
  const energy = record.record?.energy ?? {};
  for (const [name, ends] of Object.entries(energy)) if (ends) put(`energy of ${name}`, ends.map((value) => value.toPrecision(4)).join(" → "));
  return found;
}

function differences(a, b) {
  const names = [...new Set([...Object.keys(a), ...Object.keys(b)])];
  return names.filter((name) => a[name] !== b[name]).map((name) => [name, a[name] ?? "", b[name] ?? ""]);
}
