"""Layout on held-out scenes: do objects stand where the masks say? Prints the README's tables.

    python benchmarks/layout.py                  the main table, 500 layouts
    python benchmarks/layout.py --ablations      the lecture's ablations, 100 layouts
    python benchmarks/layout.py --quick          minutes on two cores

The judge (`scenes-judge`) never guided. mIoU is over classes of the whole set; "labelled" counts
only pixels that some mask covers, as in ZestGuide's Table 1.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import guidekit
from guidekit import Condition, Segment, evaluate, scenes
from guidekit.loading import model_defaults
from guidekit.registry import Registry

from memory import PeakMemory

PAPER = {"scale": 1.0, "stop": 0.5}
REFERENCE = 2000  # real scenes for the Frechet and kernel distances, from number 100,000 on


@dataclass(frozen=True)
class Layouts:
    """Held-out scenes as conditions, their class maps (n, 64, 64) and their pictures in [0, 1]."""

    plans: list[scenes.Scene]
    conditions: list[Condition]
    wanted: np.ndarray
    real: Tensor


def held_out(n: int, first: int = 0, size: int = 64) -> Layouts:
    """Scenes `first` to `first + n` of the test split; every object visible somewhere."""
    plans = [scenes.scene(i, "test") for i in range(first, first + n)]
    # Neighbours share a batch, and regions of a batch are padded to the most of it.
    plans.sort(key=lambda plan: len(plan.things))
    conditions = []
    for plan in plans:
        _, masks = scenes.draw(plan, size)
        segments = [
            Segment(thing.phrase, torch.from_numpy(mask).float(), prompt=_alone(thing, plan))
            for thing, mask in zip(plan.things, masks, strict=True)
        ]
        conditions.append(Condition(plan.caption, segments=tuple(segments)))
    wanted = np.stack([scenes.labels(plan, size) for plan in plans])
    return Layouts(plans, conditions, wanted, (scenes.batch(plans, size)[0] + 1) / 2)


def _alone(thing: scenes.Thing, plan: scenes.Scene) -> str:
    """The caption of one object on the scene's background, for methods with region prompts."""
    return scenes.caption([thing.phrase], plan.background)


def background_only(conditions: list[Condition], plans: list[scenes.Scene]) -> list[Condition]:
    """The same layouts with the background as the prompt (MultiDiffusion's prompt 0)."""
    return [
        Condition(f"a {plan.background} background", c.negative, c.segments)
        for c, plan in zip(conditions, plans, strict=True)
    ]


class Bench:
    """One model, one set of layouts, rows of measures."""

    def __init__(self, model: str, n: int, steps: int, batch: int, seed: int, cfg: float | None):
        self.pipeline = guidekit.load(model)
        self.defaults = model_defaults(model)
        self.layouts = held_out(n)
        self.judge = evaluate.load_judge()
        self.n, self.batch, self.seed = n, batch, seed
        self.steps = steps or self.defaults.get("steps", 50)
        self.cfg = cfg or self.defaults.get("cfg", 7.5)
        reference = [scenes.scene(100_000 + i, "test") for i in range(REFERENCE)]
        pictures = (scenes.batch(reference, 64)[0] + 1) / 2
        self.reference = evaluate.see(self.judge, pictures).features

    def plugin(self, name: str, **options):
        """A plugin with the model's tuned defaults and the given options."""
        tuned = self.defaults.get("plugin", {}).get(name, {})
        return Registry().make_guidance(name, tuned | options)

    def draw(self, make: Callable[[], list], conditions: list[Condition]) -> tuple[Tensor, dict]:
        """Pictures of all layouts, and seconds per picture and peak memory."""
        images = []
        start = time.perf_counter()
        with PeakMemory() as peak:
            for i in tqdm(range(0, self.n, self.batch), leave=False):
                part = conditions[i : i + self.batch]
                seeds = range(self.seed + i, self.seed + i + len(part))
                run = guidekit.sample(
                    self.pipeline, part, make(), seeds=seeds, steps=self.steps, cfg=self.cfg
                )
                images.append(run.finish().images)
        seconds = (time.perf_counter() - start) / self.n
        return torch.cat(images), {"s/image": seconds, "peak MiB": peak.mebibytes}

    def row(self, method: str, make: Callable[[], list], conditions=None) -> dict:
        """One row of the table."""
        images, cost = self.draw(make, conditions or self.layouts.conditions)
        row = self.judged(method, images) | cost
        click.echo(f"{method}: mIoU {row['mIoU']:.3f}, presence {row['presence']:.3f}", err=True)
        return row

    def judged(self, method: str, images: Tensor) -> dict:
        """The measures of pictures (n, 3, 64, 64), with 95% bootstrap intervals over layouts."""
        verdict = evaluate.see(self.judge, images)
        wanted = self.layouts.wanted
        asked = evaluate.asked_pixels(wanted)
        row = {"method": method, "n": len(images)}
        for name, only in (("mIoU", False), ("mIoU labelled", True)):
            inter, union = evaluate.overlaps(verdict.classes, wanted, only)

            def statistic(i, inter=inter, union=union):
                return evaluate.mean_iou(inter[i], union[i], asked[i])

            row[name] = statistic(np.arange(self.n))
            row[f"{name} 95%"] = evaluate.interval(statistic, self.n)
        found, objects = evaluate.presence(verdict.classes, wanted)
        groups = {"presence": objects > 0, "presence 1": objects == 1, "presence 2-3": objects > 1}
        for name, chosen in groups.items():
            f, o = found[chosen], objects[chosen]
            row[name] = float(f.sum() / o.sum())
            row[f"{name} 95%"] = evaluate.interval(
                lambda i, f=f, o=o: float(f[i].sum() / o[i].sum()), len(f)
            )
        row["Frechet"] = evaluate.frechet(verdict.features, self.reference)
        row["kernel"] = evaluate.kernel_distance(verdict.features, self.reference)
        return row

    def ceilings(self) -> list[dict]:
        """The judge on the real scenes and on their reconstructions by the autoencoder."""
        real = self.layouts.real
        denoiser = guidekit.Denoiser(self.pipeline)
        with torch.no_grad():
            back = torch.cat([denoiser.decode(denoiser.latents(p * 2 - 1)) for p in real.split(32)])
        return [self.judged("real scenes", real), self.judged("reconstructed", back)]

    def main(self) -> list[dict]:
        """The README's table."""
        plain = self.layouts.conditions
        regions = background_only(plain, self.layouts.plans)
        rows = {
            "unguided": (lambda: [], plain),
            "Paint-with-Words": (lambda: [self.plugin("pww")], plain),
            "Zest": (lambda: [self.plugin("zest")], plain),
            # Beside Paint-with-Words Zest has the paper's own strength and window.
            "Zest + PwW": (lambda: [self.plugin("pww"), self.plugin("zest", **PAPER)], plain),
            "MultiDiffusion": (lambda: [self.plugin("multidiffusion")], regions),
        }
        return self.ceilings() + [self.row(name, *row) for name, row in rows.items()]

    def ablations(self) -> list[dict]:
        """Zest alone with one field changed at a time, as in the lecture's slides."""
        scale = self.plugin("zest").scale
        variants = [("unguided", None), ("Zest (default)", {})]
        variants += [(f"loss per {kind}", {"aggregate": kind}) for kind in ("head", "layer")]
        variants += [(f"maps {r} only", {"resolutions": r}) for r in ("16", "8")]
        variants += [(f"guided share {s:g}", {"stop": s}) for s in (0.1, 0.25, 0.75, 1.0)]
        variants += [(f"scale x{f:g}", {"scale": f * scale}) for f in (0.25, 0.5, 2.0)]
        variants += [
            (f"loss {kind}", {"loss": kind})
            for kind in ("bce_plain", "bce_normalised", "mse", "power4")
        ]
        variants += [("gradient not normalised", {"normaliser": "none", "scale": 20 * scale})]
        rows = []
        for name, options in variants:
            make = (
                (lambda: []) if options is None else (lambda o=options: [self.plugin("zest", **o)])
            )
            rows.append(self.row(name, make))
        return rows


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table with the intervals in brackets."""
    names = [k for k in rows[-1] if not k.endswith("95%") and k != "n"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row, name) for name in names) + " |")
    return "\n".join(lines)


def _cell(row: dict, name: str) -> str:
    value = row.get(name, "")
    if isinstance(value, float):
        text = f"{value:.0f}" if "MiB" in name else f"{value:.3f}"
        low_high = row.get(f"{name} 95%")
        return text if low_high is None else f"{text} [{low_high[0]:.2f}, {low_high[1]:.2f}]"
    return str(value)


@click.command()
@click.option("--model", default="scenes", show_default=True, help="A scenes pipeline.")
@click.option("--n", default=0, help="Layouts; 500, for ablations 100.")
@click.option("--steps", default=0, help="Sampling steps; 0 is the model's default.")
@click.option("--cfg", default=0.0, help="Guidance scale; 0 is the model's default.")
@click.option("--batch", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the first picture.")
@click.option("--ablations", is_flag=True, help="Zest's fields one at a time.")
@click.option("--quick", is_flag=True, help="40 layouts, 15 steps.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
def main(model, n, steps, cfg, batch, seed, ablations, quick, json_file):
    """Prints mIoU, presence and distances of layout guidance on held-out scenes."""
    n = n or (40 if quick else 100 if ablations else 500)
    bench = Bench(model, n, steps or (15 if quick else 0), batch, seed, cfg)
    rows = bench.ablations() if ablations else bench.main()
    print(table(rows))
    print(
        f"\nn = {n}, seeds {seed} to {seed + n - 1}, {bench.steps} steps, cfg {bench.cfg:g}, batch "
        f"{batch}, {torch.get_num_threads()} threads of {os.cpu_count()} {platform.machine()} "
        f"cores, torch {torch.__version__}; 95% bootstrap intervals over layouts"
    )
    if json_file:
        with open(json_file, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
