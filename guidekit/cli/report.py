"""The page of a run: a static index.html made from run.json and the files beside it."""

import json
import os
from html import escape as _escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from guidekit.cli.terminal import images
from guidekit.images import COLOURS
from guidekit.system.untrusted import printable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 74rem; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; margin: 0.8rem 0; }
.seed { flex-wrap: nowrap; overflow-x: auto; }  /* so that columns can be compared */
figure { margin: 0; } figure:has(.pair) { width: 252px; }
figcaption { color: #555; font-size: 0.85rem; }
img { display: block; width: 190px; image-rendering: pixelated; border: 1px solid #ddd; }
img.pair { width: 252px; } svg { border: 1px solid #ddd; background: #fafafa; }
table { border-collapse: collapse; } td { padding: 0.1rem 1rem 0.1rem 0; vertical-align: top; }
td:first-child { color: #555; } code, pre { background: #f4f4f4; padding: 0.1rem 0.3rem; }
pre { padding: 0.6rem; overflow-x: auto; } .note { color: #8a4b00; }
.swatch { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.4em; }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #161616; }
  figcaption, td:first-child { color: #aaa; } code, pre { background: #262626; }
  svg { background: #202020; } .note { color: #e0a050; } }
"""
WIDTH, HEIGHT, MARGIN = 420, 180, 46  # of a chart, in pixels


def escape(text: str) -> str:
    """The text as HTML shows it, without characters that no file of UTF-8 holds."""
    return _escape(printable(text))


def write_report(folder: Path) -> Path:
    """Writes index.html beside the run.json of the folder."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    page = folder / "index.html"
    page.write_text(render(run, folder), encoding="utf-8")
    return page


def render(run: dict[str, Any], folder: Path) -> str:
    """The page's text for what run.json holds and the files that exist in the folder."""
    title = _title(run)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _summary(run),
        *(f'<p class="note">{escape(note)}</p>' for note in run["record"]["notes"]),
        _layout(run["segment"]),
        _images(run, folder),
        _energies(run["record"]["account"]),
        _settings(run),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _title(run: dict[str, Any]) -> str:
    """The prompt, or for models without text what is drawn with what."""
    sample = run["sample"]
    if sample["prompt"]:
        return sample["prompt"]
    label = "" if sample.get("label") is None else f", class {sample['label']}"
    plugins = f" with {', '.join(run['plugin'])}" if run["plugin"] else ""
    return f"{sample['model']}{label}{plugins}"


def _summary(run: dict[str, Any]) -> str:
    """Model, plugins and how far the run came."""
    sample, record = run["sample"], run["record"]
    plugins = ", ".join(run["plugin"]) or "none"
    done = f"{len(record['finished'])} of {images(len(sample['seeds']))}"
    text = f"model {sample['model']}, plugins {plugins}, {done}, {record['status']}"
    negative = f"<p>negative prompt: {escape(sample['negative'])}</p>" if sample["negative"] else ""
    return f"<p>{escape(text)}, {record['seconds']:.1f} s</p>{negative}"


def _layout(segments: list[dict]) -> str:
    """Every segment's box or mask with its phrase."""
    if not segments:
        return ""
    figures = [_segment(index, segment) for index, segment in enumerate(segments)]
    return f'<h2>Layout</h2><div class="row">{"".join(figures)}</div>'


def _segment(index: int, segment: dict[str, Any]) -> str:
    """One segment: its mask as an image, or its box drawn."""
    colour = COLOURS[index % len(COLOURS)]
    if "box" in segment:
        left, top, right, bottom = (float(v) * 100 for v in segment["box"])
        shape = (
            f'<svg width="112" height="112" viewBox="0 0 100 100"><rect x="{left:g}" y="{top:g}" '
            f'width="{right - left:g}" height="{bottom - top:g}" fill="{colour}"/></svg>'
        )
    else:
        mask = _link(segment["mask"])
        shape = f'<img style="width:112px" src="{mask}" alt="mask of {escape(segment["phrase"])}">'
    swatch = f'<span class="swatch" style="background:{colour}"></span>'
    strength = "" if segment["strength"] == 1 else f", strength {segment['strength']:g}"
    caption = f"<figcaption>{swatch}{escape(segment['phrase'])}{strength}</figcaption>"
    return f"<figure>{shape}{caption}</figure>"


def _images(run: dict[str, Any], folder: Path) -> str:
    """Of each seed a row of images, unguided, guided, masks drawn over, and one of attention."""
    rows = []
    if reference := _figure(folder, "reference.png", "reference"):
        rows.append(f'<div class="row">{reference}</div>')
    rows += [
        f'<h3>seed {seed}</h3><div class="row seed">{figures}</div>{_attention(run, folder, seed)}'
        for seed in run["sample"]["seeds"]
        if (figures := "".join(_figures(run, folder, seed)))
    ]
    return "<h2>Images</h2>" + ("".join(rows) or "<p>none finished</p>")


def _figures(run: dict[str, Any], folder: Path, seed: int) -> list[str]:
    """The images that there are of one seed."""
    record = run["record"]
    guided = "guided" if run["plugin"] else "image"
    target = record.get("targets", {}).get(str(seed))
    alone = "without guidance; it follows the reference too"
    bare = alone if record.get("reads_image") else "unguided"
    figures = [_figure(folder, f"unguided/{seed}.png", bare)]
    if target is None:
        figures.append(_figure(folder, f"{seed}.png", guided))
    else:  # of a data set; what it follows lies where the user keeps it
        owner = Path(target["path"]).parent.name
        figures.append(_figure(folder, os.path.relpath(target["follows"], folder), "follows"))
        figures.append(_figure(folder, target["path"], f"{guided}, class {owner}"))
    figures.append(_figure(folder, f"overlay/{seed}.png", "with its masks"))
    return figures


def _attention(run: dict[str, Any], folder: Path, seed: int) -> str:
    """A row of each segment's attention maps of one seed, with how they lie in its mask."""
    record, figures = run["record"], []
    inside = record.get("inside", {}).get(str(seed), [])
    filled = record.get("filled", {}).get(str(seed), [])
    for index, segment in enumerate(run["segment"]):
        caption = f"attention to “{segment['phrase']}”, first and last guided step"
        if index < len(inside):
            caption += f"; of the last, {inside[index]:.0%} lies inside the mask"
        if index < len(filled):
            caption += f", of which it fills {filled[index]:.0%}"
        figures.append(_figure(folder, f"attention/{seed}-{index}.png", caption, "pair"))
    return f'<div class="row">{maps}</div>' if (maps := "".join(figures)) else ""


def _figure(folder: Path, path: str, caption: str, kind: str = "single") -> str:
    """An image by its relative path, or nothing if the file does not exist."""
    if not (folder / path).is_file():
        return ""
    text, path = escape(caption), _link(path)
    image = f'<a href="{path}"><img class="{kind}" src="{path}" alt="{text}" loading="lazy"></a>'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _link(path: str) -> str:
    """A relative path as HTML takes it: `#`, `?`, `%`, `:` and quotes mean themselves."""
    return quote(os.fsencode(path))


def _energies(rows: list[dict]) -> str:
    """A chart per plugin that has energies."""
    rows = [row for row in rows if "energy" in row]
    plugins = dict.fromkeys(row["plugin"] for row in rows)
    charts = [_chart(p, [r for r in rows if r["plugin"] == p]) for p in plugins]
    return f'<h2>Energy</h2><div class="row">{"".join(charts)}</div>' if charts else ""


def _chart(plugin: str, rows: list[dict]) -> str:
    """Energy over the steps: a thin line an image, a thick one for their mean."""
    steps = [row["step"] for row in rows]
    count = min(len(row["energy"]) for row in rows)
    lines = [[row["energy"][i] for row in rows] for i in range(count)]
    known = [value for line in lines for value in line if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    span, length = (high - low) or 1.0, (max(steps) - min(steps)) or 1

    def points(values: list[float | None]) -> str:
        return " ".join(
            f"{MARGIN + (s - min(steps)) / length * (WIDTH - MARGIN - 10):.1f},"
            f"{10 + (high - v) / span * (HEIGHT - 35):.1f}"
            for s, v in zip(steps, values, strict=True)
            if v is not None
        )

    mean = [_mean(row["energy"][:count]) for row in rows]
    thin = "".join(
        f'<polyline points="{points(line)}" fill="none" stroke="#999" stroke-width="0.7"/>'
        for line in lines
    )
    thick = f'<polyline points="{points(mean)}" fill="none" stroke="#4363d8" stroke-width="2"/>'
    svg = f"{thin}{thick}{_labels(low, high, min(steps), max(steps))}"
    caption = f"<figcaption>{escape(plugin)}: mean and every image</figcaption>"
    size = f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="energy of {escape(plugin)}"'
    return f"<figure><svg {size}>{svg}</svg>{caption}</figure>"


def _labels(low: float, high: float, first: int, last: int) -> str:
    """The ends of both axes."""
    places = (
        (MARGIN - 4, 14, "end", f"{high:.3g}"),
        (MARGIN - 4, HEIGHT - 22, "end", f"{low:.3g}"),
        (MARGIN, HEIGHT - 6, "start", f"step {first}"),
        (WIDTH - 10, HEIGHT - 6, "end", f"step {last}"),
    )
    return "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" fill="#888">{text}</text>'
        for x, y, anchor, text in places
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _settings(run: dict[str, Any]) -> str:
    """Settings, plugin options, versions, and how to draw the same again."""
    sections = {"Settings": run["sample"]}
    sections |= {f"Plugin {name}": options for name, options in run["plugin"].items()}
    record = run["record"]
    sections |= {f"Control {i}": table for i, table in enumerate(record.get("controls", []))}
    sections["Machine"] = record["versions"] | record["machine"]
    sections["Resolved"] = {
        "scheduler": record["scheduler"],
        "attention": record.get("attention"),
        "model hash": record["model"]["hash"],
        **{f"tokens of {t['phrase']}": _tokens(t) for t in record["tokens"]},
        **{f"sites of {p}": ", ".join(s) for p, s in record.get("sites", {}).items()},
    }
    tables = "".join(f"<h2>{escape(k)}</h2>{_table(v)}" for k, v in sections.items())
    again = "<h2>Again</h2><pre>guidekit sample --config run.json</pre>"
    return f'{again}<p><a href="run.json">run.json</a></p>{tables}'


def _tokens(entry: dict[str, Any]) -> str:
    return " ".join(f"{c}:{t}" for c, t in zip(entry["columns"], entry["tokens"], strict=True))


def _table(values: dict[str, Any]) -> str:
    """Names and values, but for those that say nothing."""
    rows = "".join(
        f"<tr><td>{escape(str(k))}</td><td>{escape(v if isinstance(v, str) else json.dumps(v))}"
        "</td></tr>"
        for k, v in values.items()
        if v not in (None, "", [], {})
    )
    return f"<table>{rows}</table>"
