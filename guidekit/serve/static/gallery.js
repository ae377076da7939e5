// The session's runs, and two of them side by side.

import { api } from "./api.js";
import { $, el, numberOf } from "./dom.js";
import { state } from "./state.js";

const chosen = new Set();
let shown = "";

export function showRuns(runs, open) {
  const there = new Set(runs.map((run) => run.id));
  for (const id of chosen) if (!there.has(id)) chosen.delete(id);
  $("compare").disabled = chosen.size !== 2;
  const text = JSON.stringify([runs.map(({ id, state, position, done, total }) => [id, state, position, total ? Math.round((20 * done) / total) : 0]), state.run]);
  if (text === shown) return;
  shown = text;
  const { run, compare } = document.activeElement?.dataset ?? {};
  $("no-runs").hidden = runs.length > 0;
  $("runs").replaceChildren(...runs.toReversed().map((one) => card(one, open)));
  if (run) document.querySelector(`[data-run="${run}"]`)?.focus();
  if (compare) document.querySelector(`[data-compare="${compare}"]`)?.focus();
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
  const button = el("button", { type: "button", "data-run": run.id, onclick: () => open(run.id), "aria-label": `Run ${numberOf(run.id)}, ${how}: ${title}` },
    frame, el("span", { className: "text" }, el("b", {}, title), el("span", {}, `${numberOf(run.id)} · ${run.plugins.join(", ") || "no plugin"} · ${how}`)));
  const box = el("input", { type: "checkbox", "data-compare": run.id, checked: chosen.has(run.id), disabled: run.state === "queued", onchange: () => {
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
  const title = (run) => `Run ${numberOf(run.id)}`;
  const rows = [el("h3", {}, title(a)), el("h3", {}, title(b))];
  const shot = (run, path, words) =>
    el("figure", {}, run.files.includes(path) ? el("span", { className: "frame" }, el("img", { src: api.file(run.id, path), alt: words })) : el("span", { className: "frame waiting" }), el("figcaption", {}, words));
  for (const run of [a, b]) if (run.grid.length) rows.push(shot(run, "sheet.png", `${title(run)}, sheet`));
  if (!a.grid.length && !b.grid.length)
    for (const seed of seeds) for (const run of [a, b]) rows.push(shot(run, `${seed}.png`, `${title(run)}, seed ${seed}`));
  const changes = differences(flat(a), flat(b));
  const table = el("table", { className: "changes" }, el("thead", {}, el("tr", {}, ...["Setting", title(a), title(b)].map((text) => el("th", { scope: "col" }, text)))),
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
