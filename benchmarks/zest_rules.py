"""Rules for the length of Zest's step: layout, quality, and how far a rounding carries.

    python benchmarks/zest_rules.py --json benchmarks/results/zest-rules.json
    python benchmarks/zest_rules.py --quick
    python benchmarks/zest_rules.py --row "scale=0.75" --row "scale=3 damping=1" --row "halves"

A step of one length against a gradient that changes from step to step is chaotic: what differs in
the last digit grows. Each row is a rule on layouts that no table of results holds (tuning: from
number 10,000 on). "moved" is what float32 makes of it: the first images are drawn again in batches
of another size, and "moved" is the share of them that differ by more than 0.1 of full range
somewhere, "moved by" the median over images of their mean absolute difference. A row is fields of
Zest over those tuned for the model, with the paper's loss unless it names another; `halves` does
each step as two of half the length, the second with a gradient of its own.
"""

import json
import os
import platform
import time
from dataclasses import replace
from functools import partial

import click
import torch
from torch import Tensor
from torchvision.utils import save_image

import guidekit
from guidekit.registry import Registry
from guidekit.zoo.shipped import model_defaults
from guidekit_zest import Zest
from layout import Bench, Setting, table, told
from measured import Results

TUNING = 10_000
ROWS = (
    "unguided",
    "scale=1.5",
    "scale=0.75",
    "scale=1.5 momentum=0.5",
    "scale=1.5 damping=1",
    "scale=3 damping=1",
    "scale=1.5 halves",
)


class Halves(Zest):
    """Zest whose step is done in two halves, with a second gradient in between."""

    def prepare(self, run: guidekit.Run) -> None:
        super().prepare(run)
        self._again = run.read(self, replace(self._read), main=False)

    def push(self, step: guidekit.Step, grad: Tensor) -> Tensor:
        half, first = self._amount(step) / 2, self._normalised(grad)
        # In units of z, where the move keeps eps as `shift` does.
        z = step.z.detach() - half * step.level.a / step.next_level.a * first
        second = self._normalised(self._gradient(step, z))
        return step.move.shift(-half * (first + second))

    def _gradient(self, step: guidekit.Step, z: Tensor) -> Tensor:
        """The gradient of the energy at another z (B, C, h, w)."""
        with torch.enable_grad():
            z = z.requires_grad_()
            x = step.run.scheduler.scale_model_input(z, step.timestep)
            found = step.denoise(x, step.timestep, self, graph=True, stop=True)
            energy = self._total(self._aggregated(found.attention(self._again)))
            return torch.autograd.grad(energy.sum(), z)[0]


def guidances(row: str, tuned: dict) -> list[Zest]:
    """The guidance of a row: fields over the tuned ones, with `halves` for two half steps."""
    if row == "unguided":
        return []
    words = row.split()
    fields = {"loss": "bce"} | dict(word.split("=", 1) for word in words if "=" in word)
    made = Registry().make_guidance("zest", tuned, changes=fields)
    if "halves" not in words:
        return [made]
    own = {name: getattr(made, name) for name in made.given}
    return [Halves(**own)]


def measured(bench: Bench, row: str, repeated: int) -> tuple[dict, Tensor]:
    """The measures of a row, and those of its images that are drawn in batches of two sizes."""
    tuned = bench.defaults.get("plugin", {}).get("zest", {})
    conditions, first = bench.layouts.conditions, bench.setting.seed
    seeds = range(first, first + len(conditions))
    make, start = partial(guidances, row, tuned), time.process_time()
    images = bench.images(make, conditions, seeds)
    seconds = time.process_time() - start
    chosen = [*range(0, len(images), len(images) // repeated)][:repeated]
    few, own = [conditions[i] for i in chosen], [seeds[i] for i in chosen]
    again = bench.images(make, few, own, batch=bench.setting.batch // 4)
    gap = (again - images[chosen]).abs().flatten(1)
    found = bench.judged(row, images)
    kept = ("method", "n", "mIoU", "mIoU 95%", "mIoU labelled", "presence", "Frechet")
    measures = {
        **{name: found[name] for name in kept},
        "moved": float((gap.amax(1) > 0.1).float().mean()),
        "moved by": float(gap.mean(1).median()),
        "s/image": seconds / len(images),
    }
    return measures, images[chosen]


@click.command()
@click.option("--model", default="scenes", show_default=True, help="A scenes pipeline.")
@click.option("--n", default=0, help="Layouts [64].")
@click.option("--repeated", default=8, show_default=True, help="Images that are drawn again.")
@click.option("--batch", default=16, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the first image.")
@click.option("--row", "wanted", multiple=True, help="Rows in place of the usual ones.")
@click.option("--quick", is_flag=True, help="8 layouts, 10 steps, two rows.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Also write the rows here.")
@click.option("--sheet", type=click.Path(dir_okay=False), help="Also save some images of each row.")
def main(model, n, repeated, batch, seed, wanted, quick, path, sheet):
    """Prints a row for every rule."""
    torch.set_num_threads(1)
    defaults = model_defaults(model)
    n, steps = n or (8 if quick else 64), 10 if quick else defaults.get("steps", 50)
    setting = Setting(model, n, steps, defaults.get("cfg", 7.5), batch, seed, first=TUNING)
    bench, rows, shown = Bench(setting), [], []
    results = Results(path, **told(setting), repeated=min(repeated, n))
    for row in wanted or (ROWS[1:3] if quick else ROWS):
        measures, images = measured(bench, row, min(repeated, n))
        rows.append(measures)
        results.extend([measures])
        shown.append(images)
        click.echo(json.dumps(measures), err=True)
        if sheet:
            save_image(torch.cat(shown), sheet, nrow=len(images))
    print(table([row | {"moved by": f"{row['moved by']:.0e}"} for row in rows]))
    print(
        f"\nn = {n} layouts from number {TUNING}, seeds {seed} to {seed + n - 1}, {steps} steps, "
        f"cfg {setting.cfg:g}, batch {batch}, {min(repeated, n)} of them drawn again in batches of "
        f"{batch // 4}, float32, one thread on {os.cpu_count()} {platform.machine()} cores, "
        f"torch {torch.__version__}"
    )
    results.finish()


if __name__ == "__main__":
    main()
