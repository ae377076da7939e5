"""Search: the first noise is the best of several, by the reward of the images that they lead to.

Ma, Tong, Jia, Hu, Su, Zhang, Yang, Li, Jaakkola, Jia, Xie: Inference-Time Scaling for Diffusion
Models beyond Scaling Denoising Steps, 2025, arXiv:2501.09732. Section 3: random search draws
candidates apart, zero-order search round the best so far, again and again. Each candidate is a
whole run without guidances, and needs no gradient. A reward that guides is no judge of the outcome.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from guidekit import Guidance, GuidekitError, Run, hookimpl
from guidekit.toolbox import ImportPath, Reward, RewardFunction, guiding, rewarded


@dataclass(kw_only=True)
class Search(Guidance):
    """Begins with the noise of the highest reward, each image by itself; its own is one of them."""

    plugin = "search"

    scale: float = 1.0  # 1 on, 0 off
    # brightness, contrast, or MODULE:NAME of a Reward or a function of images in [-1, 1]; in Python
    # one of these
    reward: ImportPath | Reward | RewardFunction = "contrast"
    method: Literal["random", "zero-order"] = "random"  # candidates apart, or round the best
    candidates: int = 4  # of a round, each a whole run
    rounds: int = 1  # of zero-order search
    radius: float = 0.3  # share of new noise, by its standard deviation, in a neighbour

    def __post_init__(self):
        super().__post_init__()
        if self.candidates < 1 or self.rounds < 1 or not 0 < self.radius <= 1:
            raise GuidekitError(
                f"{self.name}: candidates and rounds are at least 1, radius above 0 up to 1"
            )

    def prepare(self, run: Run) -> None:
        """Finds the reward."""
        self._reward = guiding(self.reward, self.name, run.account.guided)

    def begin(self, run: Run) -> Tensor:
        """The first z (B, C, h, w) of the best noise."""
        unit = run.first_std
        best = run.first.detach().float() / unit
        most = self._rewarded(run, best * unit, 0)
        for turn in range(self.rounds if self.method == "zero-order" else 1):
            pivot = best
            for number in range(self.candidates):
                noise = self._candidate(run, pivot, turn, number)
                found = self._rewarded(run, noise * unit, 1 + turn * self.candidates + number)
                better = found > most
                best = torch.where(better[:, None, None, None], noise, best)
                most = torch.where(better, found, most)
        return best * unit

    def _candidate(self, run: Run, pivot: Tensor, turn: int, number: int) -> Tensor:
        """Noise apart from the pivot (B, C, h, w), or near it; of variance 1 either way."""
        fresh = run.noise(run.latent_shape, turn, number, self.name).to(pivot)
        if self.method == "random":
            return fresh
        return (1 - self.radius**2) ** 0.5 * pivot + self.radius * fresh

    def _rewarded(self, run: Run, z: Tensor, number: int) -> Tensor:
        """Rewards (B,) of the images that a first z leads to."""
        with torch.no_grad():
            found = rewarded(self._reward, run.denoiser.pixels(run.rollout(z)), self.name)
        run.account.reward(self.name, 0, number, found)
        return found

    @classmethod
    def example(cls) -> "Search":
        """Four candidates, by their brightness."""
        return cls(reward="brightness")


@hookimpl
def register_guidance(register):
    """Offers `search`."""
    register("search", Search)
