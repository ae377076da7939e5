"""RED-diff: an image by optimisation, with the denoiser for a prior and a measurement to meet.

Mardani, Song, Kautz, Vahdat: A Variational Perspective on Solving Inverse Problems with Diffusion
Models, ICLR 2024, arXiv:2305.04391. Algorithm 1: no sample is carried; at every level, from the
noisy end, Adam takes one step on the distance to the measurement and on the prior's term, the
difference of predicted and drawn noise. It starts from A^+ y, the smallest image of which y is
measured.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guidekit import GuidekitError, Run, Step, hookimpl
from guidekit.toolbox import InverseGuidance


@dataclass(kw_only=True)
class RedDiff(InverseGuidance):
    """Draws an image of which the measurement is that of a reference."""

    plugin = "red-diff"

    scale: float = 1.0  # weight of the measurement; 0 switches it off
    prior: float = 0.25  # weight of the prior, times sigma
    rate: float = 0.1  # Adam's step

    waived: ClassVar[dict[str, str]] = {
        "batch": "Adam's first steps have full length whatever the gradient's, so that roundings "
        "of another batch size are seen; in float64 on the built-in models rows do not mix"
    }

    def __post_init__(self):
        super().__post_init__()
        if not self.rate > 0 or self.prior < 0:
            raise GuidekitError(f"{self.name}: rate is above 0 and prior at least 0")

    def solve(
        self, run: Run, z: Tensor, predict: Callable[[Tensor, int], Step]
    ) -> Iterator[tuple[Step, Tensor]]:
        """One step of Adam at every level that holds something of the image (Algorithm 1)."""
        with torch.no_grad():
            first = self._linear.pinv(self._measured)
            start = run.denoiser.latents(first.expand(len(z), -1, -1, -1))
        mean = start.detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([mean], self.rate, betas=(0.9, 0.99))
        for index in range(len(run.levels)):
            level = run.levels.at(index)
            if not level.informative:
                continue
            noise = run.noise(run.latent_shape, index, self.name).to(mean)
            noisy = level.a * mean.detach() + level.s * noise
            step = predict(noisy, index)
            error = level.eps(step.prediction, step.z).to(mean) - noise
            with torch.enable_grad():
                apart = self.residual(step.decode(mean)).square().flatten(1).mean(1) / 2
                prior = self.prior * level.sigma * (error * mean).mean((1, 2, 3))
                (mean.grad,) = torch.autograd.grad((self.scale * apart + prior).sum(), mean)
            optimiser.step()
            run.account.reward(self.name, index, step.repeat, -apart)
            yield step, mean


@hookimpl
def register_guidance(register):
    """Offers `red-diff`."""
    register("red-diff", RedDiff)
