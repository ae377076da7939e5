"""Methods of inverse problems on the built-in pixel models: how near to the truth, and how long.

    python benchmarks/family.py --json benchmarks/results/family.json
    python benchmarks/family.py --quick
    python benchmarks/family.py --model digits-ddpm --task inpainting --method "pigdm"

Held-out images are measured by an operator, without noise, and drawn again from the measurement
alone. PSNR is that of the drawn image; beside it that of A^+ y, the measurement put back, and of
an unguided run. `measured` is the root mean square of y - A x over what was measured; an interval
is 95% over images. Seconds are of a whole image in a batch, on one thread.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from guidekit import Condition, Sampling, load
from guidekit.evaluate.intervals import interval
from guidekit.evaluate.restoration import psnr
from guidekit.toolbox import Downsampling, Inpainting, InverseGuidance, LinearOperator
from guidekit.worlds import digits, scenes
from guidekit_ddnm import Ddnm
from guidekit_dps import Dps
from guidekit_energy import Energy
from guidekit_flowchef import FlowChef
from guidekit_freedom import FreeDom
from guidekit_lgd import Lgd
from guidekit_mpgd import Mpgd
from guidekit_pigdm import Pigdm
from guidekit_psld import Psld
from guidekit_tfg import TrainingFree
from guidekit_ugd import Universal
from measured import Results


def middle(size: int) -> Inpainting:
    """Inpainting of the middle half of either side."""
    known = torch.ones(size, size)
    known[size // 4 : size * 3 // 4, size // 4 : size * 3 // 4] = 0
    return Inpainting(known)


TASKS: dict[str, Callable[[int], LinearOperator]] = {
    "inpainting": middle,
    "4x super-resolution": lambda size: Downsampling(4),
}
MODELS = ("digits-ddpm", "scenes-ddpm")

# By name: the class and its options. Scales are the best of a few tried on three training scenes of
# scenes-ddpm, for both tasks.
METHODS: dict[str, tuple[type[InverseGuidance], dict]] = {
    "dps": (Dps, {"scale": 3.0}),
    "psld": (Psld, {"scale": 2.0, "gluing": 0.2}),
    "pigdm": (Pigdm, {}),
    "pigdm, by score": (Pigdm, {"weight": "score"}),
    "lgd": (Lgd, {"noise": 2.0}),
    "energy": (Energy, {"scale": 1.0}),
    "ugd": (Universal, {"scale": 1.0, "backward": 10, "rate": 0.1}),
    "freedom": (FreeDom, {"scale": 10.0}),
    "mpgd": (Mpgd, {"scale": 8.0}),
    "flowchef": (FlowChef, {"scale": 8.0}),
    "tfg": (TrainingFree, {"rho": 0.5, "mu": 0.25}),
    "ddnm": (Ddnm, {}),
    "ddnm, 2 times": (Ddnm, {"travel": 5, "times": 2}),
}


@dataclass
class Problem:
    """Images of a model's held-out split, and what an operator makes of them."""

    model: str
    task: str
    count: int
    steps: int
    batch: int

    def __post_init__(self):
        self.pipe = load(self.model)
        self.truth = held_out(self.model, self.count, self.pipe.unet.config.sample_size)
        self.operator = TASKS[self.task](self.truth.shape[-1])
        self.measured = self.operator.forward(self.truth)

    def restored(self) -> Tensor:
        """A^+ y, the measurement put back, in [-1, 1]."""
        return self.operator.pinv(self.measured)

    def draw(self, guidance: InverseGuidance | None) -> tuple[Tensor, float]:
        """Images in [-1, 1] of all measurements, and seconds an image."""
        started, latents = time.perf_counter(), []
        for first in range(0, self.count, self.batch):
            seeds = range(first, min(first + self.batch, self.count))
            conditions = [Condition()] * len(seeds)
            if guidance is not None:
                conditions = [Condition(targets={guidance.name: self.measured[i]}) for i in seeds]
            guidances = [] if guidance is None else [guidance]
            given = {"seeds": seeds, "steps": self.steps}
            latents.append(Sampling(self.pipe, conditions, guidances, **given).finish().latents)
        return torch.cat(latents).clamp(-1, 1), (time.perf_counter() - started) / self.count

    def row(self, method: str, images: Tensor, seconds: float) -> dict:
        """A line of the table."""
        values = psnr(images / 2 + 0.5, self.truth / 2 + 0.5).numpy()
        low, high = interval(lambda i: float(values[i].mean()), len(values))
        apart = (self.operator.forward(images) - self.measured).square()
        seen = self.operator.forward(torch.ones_like(images)).ne(0)
        return {
            "model": self.model,
            "task": self.task,
            "method": method,
            "psnr": round(float(values.mean()), 2),
            "psnr 95%": [round(low, 2), round(high, 2)],
            "measured": round(math.sqrt(float(apart.sum() / seen.sum())), 4),
            "seconds": round(seconds, 3),
        }


def held_out(model: str, count: int, size: int) -> Tensor:
    """Images (n, C, H, W) in [-1, 1] that the model was not trained on."""
    if model == "digits-ddpm":
        return digits.split("test")[0][:count]
    return scenes.batch([scenes.scene(i, "test") for i in range(count)], size)[0]


def rows(problem: Problem, methods: tuple[str, ...]) -> Iterator[dict]:
    """The measurement put back, the unguided run and every method on one problem."""
    yield problem.row("A^+ y", problem.restored(), 0.0)
    yield problem.row("unguided", *problem.draw(None))
    for name in methods:
        cls, options = METHODS[name]
        yield problem.row(name, *problem.draw(cls(operator=problem.operator, **options)))


@click.command()
@click.option("--quick", is_flag=True, help="4 images, 20 steps.")
@click.option("--count", default=200, show_default=True, help="Images.")
@click.option("--steps", default=50, show_default=True)
@click.option("--batch", default=20, show_default=True)
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS))
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(TASKS)))
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)))
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write the rows there.")
def main(quick, count, steps, batch, models, tasks, methods, path) -> None:
    """Print a row for each method on each problem."""
    torch.set_num_threads(1)
    count, steps = (4, 20) if quick else (count, steps)
    results = Results(path, n=count, seeds=[0, count - 1], steps=steps, batch=batch)
    for model in models or MODELS:
        for task in tasks or TASKS:
            problem = Problem(model, task, count, steps, batch)
            for row in rows(problem, methods or tuple(METHODS)):
                results.add(row)
    results.finish()


if __name__ == "__main__":
    main()
