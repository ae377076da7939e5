"""Layout on held-out scenes: do objects stand where the masks say? Prints the README's tables.

    python benchmarks/layout.py                  the main table, 500 layouts
    python benchmarks/layout.py --ablations      the lecture's ablations, 100 layouts; --world too
    python benchmarks/layout.py --world objects  everyday things; the ceilings need --cutouts FOLDER
    python benchmarks/layout.py --quick          minutes on two cores
    python benchmarks/layout.py --scheduler dpm++ --scales 0.75,1.5,3     Zest's scale on a solver
    python benchmarks/layout.py --trained runs   beside controls of `guidekit train --out runs`

The world's judge never guided. mIoU is over classes of the whole set; "labelled" counts
only pixels that some mask covers, as in ZestGuide's Table 1. Every row runs in a process of its
own with one thread; cost is that process's time on the CPU, which other programs disturb little,
and the growth of its resident set while it draws.
"""

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

import guidekit
from guidekit import Condition
from guidekit.backbones.loading import make_scheduler
from guidekit.evaluate import judge as evaluate
from guidekit.evaluate.layout import LayoutCounts
from guidekit.registry import Registry
from guidekit.zoo.shipped import model_defaults
from layout_trained import TRAINED, kind, loaded, there, with_maps
from layout_worlds import WORLDS, world_of
from measured import Results
from memory import PeakMemory

CEILINGS = "ceilings"


# Guidances of a row: plugin and the fields that differ from the model's tuned defaults.
METHODS = {
    "unguided": [],
    "Paint-with-Words": [("pww", {})],
    "Zest": [("zest", {})],
    "Zest + PwW": [("pww", {}), ("zest", {})],
    "MultiDiffusion": [("multidiffusion", {})],
}

# Zest alone with one field changed at a time, as in the lecture's slides.
FIELDS = {
    "loss per head": {"aggregate": "head"},
    "loss per layer": {"aggregate": "layer"},
    "maps 16 only": {"resolutions": "16"},
    "maps 8 only": {"resolutions": "8"},
    "guided share 0.1": {"stop": 0.1},
    "guided share 0.25": {"stop": 0.25},
    "guided share 0.5": {"stop": 0.5},
    "guided share 1": {"stop": 1.0},
    "a quarter of the scale": {"scale": 0.25},
    "half the scale": {"scale": 0.5},
    "twice the scale": {"scale": 2.0},
    "four times the scale": {"scale": 4.0},
    "loss bce_plain": {"loss": "bce_plain"},
    "loss bce_normalised": {"loss": "bce_normalised"},
    "loss mse": {"loss": "mse"},
    "loss power4": {"loss": "power4"},
    "gradient not normalised": {"normaliser": "none", "scale": 20.0},
}
PAPER = "the paper's loss"
ABLATIONS = ("unguided", PAPER, *FIELDS)
# The scale that is best for the paper's loss on a world's model, of which FIELDS has multiples.
BEST = {"scenes": 1.5, "objects": 0.5}


def ablation(method: str, world: str) -> list[tuple[str, dict]]:
    """The guidances of a row of `--ablations`: the paper's loss with one field changed."""
    fields = {"loss": "bce", "scale": 1.0} | FIELDS.get(method, {})
    return [("zest", fields | {"scale": fields["scale"] * BEST[world]})]


SCALED = "Zest at scale "


def scaled(method: str) -> list[tuple[str, dict]]:
    """The guidances of a row of `--scales`: the tuned Zest with another scale."""
    return [("zest", {"scale": float(method.removeprefix(SCALED))})]


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    model: str
    n: int
    steps: int
    cfg: float
    batch: int
    seed: int
    scheduler: str = ""
    first: int = 0  # number of the first layout; those from 10,000 on are for tuning
    trained: str = ""  # folder of the runs of controls
    world: str = "scenes"
    cutouts: str = ""  # of objects, for the ceilings alone


class Bench:
    """One model, one set of layouts, rows of measures."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.pipeline = guidekit.load(setting.model)
        own = setting.scheduler
        self.scheduler = make_scheduler(self.pipeline, own) if own else self.pipeline.scheduler
        self.controls: list[guidekit.Control] = []
        self.defaults = model_defaults(setting.model)
        self.world = world_of(setting.world, setting.cutouts)
        self.layouts = self.world.layouts(setting.n, setting.first)
        self.judge = evaluate.load_judge(self.world.judge)
        self.reference = self.world.features(self.judge)

    def guidances(self, method: str) -> list:
        """Fresh guidances of a row: the model's tuned defaults with the row's own fields."""
        if method in TRAINED:
            made = TRAINED[method].guidances
        elif method in METHODS:
            made = METHODS[method]
        elif method in ABLATIONS:
            made = ablation(method, self.setting.world)
        else:
            made = scaled(method)
        return [self.made(name, own) for name, own in made]

    def made(self, plugin: str, options: dict) -> guidekit.Guidance:
        """A guidance with the model's tuned options and these."""
        tuned = self.defaults.get("plugin", {}).get(plugin, {})
        return Registry().make_guidance(plugin, tuned | options)

    def draw(self, method: str, conditions: list[Condition]) -> tuple[Tensor, dict]:
        """Images of all layouts, seconds of CPU (or GPU) per image and peak memory."""
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        start = clock()
        with PeakMemory() as peak:
            seeds = range(self.setting.seed, self.setting.seed + len(conditions))
            images = self.images(lambda: self.guidances(method), conditions, seeds)
        cost = {"s/image": (clock() - start) / len(images), "peak MiB": peak.mebibytes}
        return images, cost

    def images(
        self,
        make: Callable[[], list],
        conditions: list[Condition],
        seeds: Sequence[int],
        batch: int = 0,
    ) -> Tensor:
        """Images (n, 3, H, W) of conditions, by guidances that `make` makes for every batch."""
        drawn, s = [], self.setting
        for i in tqdm(range(0, len(conditions), size := batch or s.batch), leave=False):
            run = guidekit.sample(
                self.pipeline,
                conditions[i : i + size],
                make(),
                seeds=seeds[i : i + size],
                steps=s.steps,
                cfg=s.cfg,
                scheduler=self.scheduler,
                controls=self.controls,
            )
            drawn.append(run.finish().images)
        return torch.cat(drawn)

    def rows(self, method: str) -> list[dict]:
        """The row of a method, or both of the judge's ceilings."""
        if method == CEILINGS:
            return self.ceilings()
        conditions = self.layouts.conditions
        if method == "MultiDiffusion":
            conditions = self.layouts.on_grounds()
        if method in TRAINED:
            self.controls, own = loaded(method, Path(self.setting.trained))
            self.pipeline = own or self.pipeline
            conditions = with_maps(conditions, self.setting.first, self.controls)
        images, cost = self.draw(method, conditions)
        return [self.judged(method, images) | cost]

    def judged(self, method: str, images: Tensor) -> dict:
        """The measures of images (n, 3, H, W), with 95% bootstrap intervals over layouts."""
        verdict = evaluate.see(self.judge, images)
        counts = LayoutCounts(len(self.world.classes))
        counts.add(verdict.classes, self.layouts.wanted)
        row = {"method": method} | kind(method) | {"n": len(images)} | counts.row()
        row["Frechet"] = evaluate.frechet(verdict.features, self.reference)
        row["kernel"] = evaluate.kernel_distance(verdict.features, self.reference)
        return row

    def ceilings(self) -> list[dict]:
        """The judge on the real scenes and on their reconstructions by the autoencoder."""
        real = self.world.real(self.setting.n, self.setting.first)
        denoiser = guidekit.Denoiser(self.pipeline)
        with torch.no_grad():
            back = torch.cat([denoiser.decode(denoiser.latents(p * 2 - 1)) for p in real.split(32)])
        return [self.judged("real scenes", real), self.judged("reconstructed", back)]


def told(setting: Setting) -> dict:
    """What the results say of all rows."""
    facts = vars(setting)
    first, last = setting.seed, setting.seed + setting.n - 1
    return facts | {"seeds": [first, last], "intervals": "95% bootstrap intervals over layouts"}


def run_row(setting: Setting, method: str) -> list[dict]:
    """One row, in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Bench(setting).rows(method)


def there_of(results: Results, method: str) -> list[dict]:
    """The rows of a method that are there already."""
    names = ("real scenes", "reconstructed") if method == CEILINGS else (method,)
    return [row for row in results.rows if row["method"] in names]


def all_rows(setting: Setting, methods: list[str], workers: int, results: Results) -> dict:
    """Rows by method, some at a time; those of a run that was cut short stay."""
    done = {method: kept for method in methods if (kept := there_of(results, method))}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        left = [method for method in methods if method not in done]
        futures = {pool.submit(run_row, setting, method): method for method in left}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            results.extend(future.result())
            for row in future.result():
                click.echo(json.dumps(row), err=True)
    return done


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table with the intervals in brackets."""
    names = [k for k in rows[-1] if not k.endswith("95%") and k != "n"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(_cell(row, name) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(row: dict, name: str) -> str:
    value = row.get(name, "")
    if isinstance(value, float):
        text = f"{value:.0f}" if "MiB" in name else f"{value:.3f}"
        low_high = row.get(f"{name} 95%")
        return text if low_high is None else f"{text} [{low_high[0]:.2f}, {low_high[1]:.2f}]"
    return str(value)


@click.command()
@click.option("--world", default="scenes", show_default=True, type=click.Choice(WORLDS))
@click.option("--cutouts", default="", help="Folder of the objects' cut-outs, for the ceilings.")
@click.option("--model", default="", help="A pipeline of the world; default the one of its name.")
@click.option("--n", default=0, help="Layouts; 500, for ablations 100.")
@click.option("--steps", default=0, help="Sampling steps; 0 is the model's default.")
@click.option("--cfg", default=0.0, help="Guidance scale; 0 is the model's default.")
@click.option("--batch", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the first image.")
@click.option("--ablations", is_flag=True, help="Zest's fields one at a time.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([CEILINGS, *METHODS, *ABLATIONS, *TRAINED]),
    help="A row.",
)
@click.option("--trained", default="", help="Folder of the runs of trained controls.")
@click.option("--scheduler", default="", help="Its name; default the model's.")
@click.option("--scales", default="", help="Rows of Zest at these scales alone, 0.75,1.5,3.")
@click.option("--quick", is_flag=True, help="40 layouts, 15 steps.")
@click.option("--workers", default=2, show_default=True, help="Rows at a time, a thread each.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
def main(
    world,
    cutouts,
    model,
    n,
    steps,
    cfg,
    batch,
    seed,
    ablations,
    only,
    trained,
    scheduler,
    scales,
    quick,
    workers,
    json_file,
):
    """Prints mIoU, presence and distances of layout guidance on held-out scenes."""
    model = model or world
    defaults = model_defaults(model)
    n = n or (40 if quick else 100 if ablations else 500)
    steps = steps or (15 if quick else defaults.get("steps", 50))
    cfg = cfg or defaults.get("cfg", 7.5)
    setting = Setting(
        model, n, steps, cfg, batch, seed, scheduler, trained=trained, world=world, cutouts=cutouts
    )
    own = there(Path(trained)) if trained else []
    if missing := [TRAINED[name].recipe for name in only if name in TRAINED and name not in own]:
        raise click.UsageError(f"guidekit train {missing[0]} --out RUNS, then --trained RUNS")
    methods = list(only) or ([*ABLATIONS] if ablations else [CEILINGS, *METHODS, *own])
    if scales:
        methods = ["unguided", *(f"{SCALED}{float(scale):g}" for scale in scales.split(","))]
    # MultiDiffusion takes longest: first, so that no worker waits for it at the end.
    results = Results(json_file, resume=True, **told(setting))
    ordered = sorted(methods, key=lambda m: m != "MultiDiffusion")
    done = all_rows(setting, ordered, workers, results)
    rows = [row for method in methods for row in done[method]]
    results.facts |= {"rows": rows, "threads": 1}  # of a row's process
    results.finish()
    print(table(rows))
    print(
        f"\nn = {n}, seeds {seed} to {seed + n - 1}, {steps} steps, cfg {setting.cfg:g}, "
        f"scheduler {scheduler or 'of the model'}, batch "
        f"{batch}, one thread a row on {os.cpu_count()} {platform.machine()} "
        f"cores, torch {torch.__version__}; 95% bootstrap intervals over layouts"
    )


if __name__ == "__main__":
    main()
