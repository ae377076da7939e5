"""RED-diff: an image by optimisation, with the denoiser for a prior and a measurement to meet.

Mardani, Song, Kautz, Vahdat: A Variational Perspective on Solving Inverse Problems with Diffusion
Models, ICLR 2024, arXiv:2305.04391. Algorithm 1: no sample is carried; at every level, from the
noisy end, Adam takes one step on the distance to the measurement and on the prior's term, the
difference of predicted and drawn noise. The measurement is a reference made `down` times smaller.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit import Guidance, GuidekitError, Run, Step, hookimpl
from guidekit.toolbox import read_references


@dataclass(kw_only=True)
class RedDiff(Guidance):
    """Draws an image whose means over squares of pixels are those of a reference.

    `Condition(targets={"red-diff": reference})` gives each image its own, (3, H, W) in [-1, 1].
    """

    plugin = "red-diff"

    scale: float = 1.0  # weight of the measurement; 0 switches it off
    image: Path = Path("")  # reference image; scene-3 is a built-in one
    down: int = 4  # side of a square in pixels
    prior: float = 0.25  # weight of the prior, times sigma
    rate: float = 0.1  # Adam's step

    def __post_init__(self):
        super().__post_init__()
        if self.down < 1 or not self.rate > 0 or self.prior < 0:
            raise GuidekitError(
                f"{self.name}: down is at least 1, rate above 0 and prior at least 0"
            )

    def prepare(self, run: Run) -> None:
        """Reads the reference; raises GuidekitError for none, and for one of another size."""
        own = run.targets(self.name)
        if own is None and self.image == Path(""):
            raise GuidekitError(f"{self.name} needs a reference: --set {self.name}.image=FILE")
        images = read_references([self.image], run.size) if own is None else torch.stack(own)
        if any(side % self.down for side in run.size):
            raise GuidekitError(f"{self.name}.down={self.down} does not divide {run.size}")
        self._small = F.avg_pool2d(images.to(run.device), self.down)

    def solve(
        self, run: Run, z: Tensor, predict: Callable[[Tensor, int], Step]
    ) -> Iterator[tuple[Step, Tensor]]:
        """One step of Adam at every level that holds something of the image (Algorithm 1)."""
        large = F.interpolate(self._small, scale_factor=float(self.down), mode="nearest")
        with torch.no_grad():
            start = run.denoiser.latents(large.expand(len(z), -1, -1, -1))
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
                small = F.avg_pool2d(step.decode(mean), self.down)
                apart = (small - self._small).square().mean((1, 2, 3)) / 2
                prior = self.prior * level.sigma * (error * mean).mean((1, 2, 3))
                (mean.grad,) = torch.autograd.grad((self.scale * apart + prior).sum(), mean)
            optimiser.step()
            run.account.reward(self.name, index, step.repeat, -apart)
            yield step, mean

    @classmethod
    def example(cls) -> "RedDiff":
        """A built-in reference."""
        return cls(image=Path("scene-3"))


@hookimpl
def register_guidance(register):
    """Offers `red-diff`."""
    register("red-diff", RedDiff)
