"""Part `inverse` of benchmarks/family.py: inpainting and 4x super-resolution of held-out images.

Images are measured by an operator, without noise, and drawn again from the measurement alone. PSNR
is that of the drawn image; beside it that of A^+ y, the measurement put back, and of an unguided
run. `measured` is the root mean square of y - A x over what was measured.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

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
from memory import PeakMemory


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
    "lgd": (Lgd, {"noise": 2.0, "scale": 0.1}),
    "energy": (Energy, {"scale": 0.3}),
    "ugd": (Universal, {"scale": 1.0, "backward": 10, "rate": 0.1}),
    "freedom": (FreeDom, {"scale": 10.0}),
    "mpgd": (Mpgd, {"scale": 8.0}),
    "flowchef": (FlowChef, {"scale": 8.0}),
    "tfg": (TrainingFree, {"rho": 0.1, "mu": 0.25}),
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
    seed: int = 0

    def __post_init__(self):
        self.pipe = load(self.model)
        self.truth = held_out(self.model, self.count, self.pipe.unet.config.sample_size)
        self.operator = TASKS[self.task](self.truth.shape[-1])
        self.measured = self.operator.forward(self.truth)

    def restored(self) -> Tensor:
        """A^+ y, the measurement put back, in [-1, 1]."""
        return self.operator.pinv(self.measured)

    def draw(self, guidance: InverseGuidance | None) -> tuple[Tensor, dict]:
        """Images in [-1, 1] of all measurements, and what they cost."""
        started, latents = time.process_time(), []
        with PeakMemory() as peak:
            for first in range(0, self.count, self.batch):
                numbers = range(first, min(first + self.batch, self.count))
                conditions = [Condition()] * len(numbers)
                if guidance is not None:
                    targets = [{guidance.name: self.measured[i]} for i in numbers]
                    conditions = [Condition(targets=own) for own in targets]
                guidances = [] if guidance is None else [guidance]
                given = {"seeds": [self.seed + i for i in numbers], "steps": self.steps}
                run = Sampling(self.pipe, conditions, guidances, **given)
                latents.append(run.finish().latents)
        return torch.cat(latents).clamp(-1, 1), cost(started, self.count, peak, self.batch)

    def row(self, images: Tensor) -> dict:
        """The numbers of images in [-1, 1]."""
        values = psnr(images / 2 + 0.5, self.truth / 2 + 0.5).numpy()
        low, high = interval(lambda i: float(values[i].mean()), len(values))
        apart = (self.operator.forward(images) - self.measured).square()
        seen = self.operator.forward(torch.ones_like(images)).ne(0)
        return {
            "PSNR": round(float(values.mean()), 2),
            "PSNR 95%": (round(low, 2), round(high, 2)),
            "measured": round(math.sqrt(float(apart.sum() / seen.sum())), 4),
        }


def held_out(model: str, count: int, size: int) -> Tensor:
    """Images (n, C, H, W) in [-1, 1] that the model was not trained on."""
    if model == "digits-ddpm":
        return digits.split("test")[0][:count]
    return scenes.batch([scenes.scene(i, "test") for i in range(count)], size)[0]


def cost(started: float, count: int, peak: PeakMemory, batch: int) -> dict[str, float]:
    """CPU time and memory of an image in a batch."""
    return {
        "s/image": round((time.process_time() - started) / count, 4),
        "MiB/image": round(peak.mebibytes / min(batch, count), 1),
    }


def row_keys() -> list[dict[str, str]]:
    """What names each row: the measurement put back, the unguided run, and every method."""
    methods = ("A^+ y", "unguided", *METHODS)
    return [
        {"model": model, "task": task, "method": method}
        for model in MODELS
        for task in TASKS
        for method in methods
    ]


def row(key: dict[str, str], count: int, steps: int, batch: int, seed: int) -> dict:
    """One row."""
    problem = Problem(key["model"], key["task"], count, steps, batch, seed)
    if key["method"] == "A^+ y":
        return key | problem.row(problem.restored())
    guidance = None
    if key["method"] != "unguided":
        cls, options = METHODS[key["method"]]
        guidance = cls(operator=problem.operator, **options)
    images, costs = problem.draw(guidance)
    return key | problem.row(images) | costs
