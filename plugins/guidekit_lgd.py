"""LGD: the likelihood is averaged over clean images round the estimate, by Monte Carlo.

Song, Zhang, Yin, Mardani, Liu, Kautz, Chen, Vahdat: Loss-Guided Diffusion Models for Plug-and-Play
Controllable Generation, ICML 2023. Section 4: the score of y is the gradient of the logarithm of
the mean of exp(-loss(x0 + r n)) over normal n, r = sigma / sqrt(1 + sigma^2).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import GuidekitError, Step, hookimpl
from guidekit.toolbox import LossGuidance


@dataclass(kw_only=True)
class Lgd(LossGuidance):
    """Adds the score of a measurement, or of a loss, averaged over images near the estimate."""

    plugin = "lgd"

    scale: float = 1.0  # factor on the score
    samples: int = 10  # of the mean
    noise: float = 0.1  # standard deviation that a measurement is taken to have

    def __post_init__(self):
        super().__post_init__()
        if self.samples < 1 or not self.noise > 0:
            raise GuidekitError(f"{self.name}.samples is at least 1 and noise above 0")

    def energy(self, step: Step) -> Tensor:
        """Minus the logarithm of the mean likelihood (B,)."""
        width = step.level.s / math.hypot(step.level.a, step.level.s)
        factor = 1.0 if self._loss else 1 / (2 * self.noise**2)
        found = []
        for sample in range(self.samples):
            near = width * step.noise(f"{self.name}-{sample}").to(step.x0)
            found.append(-factor * self.squared(step, step.x0 + near))
        return math.log(self.samples) - torch.stack(found).logsumexp(0)


@hookimpl
def register_guidance(register):
    """Offers `lgd`."""
    register("lgd", Lgd)
