"""Moves of z that follow the attention maps of single tokens: a base of guidance.

The loop is Attend-and-Excite's, Chefer et al. 2023 (arXiv:2301.13826, section 4 and Algorithm 1):
a move before every step, and at chosen early steps as many as it takes. Numbers are those of its
released code; layers of one grid count, a quarter of the latents' side, which is 16x16 there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from guidekit.bases.token_reads import TokenMaps, sites_of_one_grid, smoothed
from guidekit.conditions import Condition, require_segments
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.reads import average_maps
from guidekit.run import Run
from guidekit.step import Step


@dataclass(kw_only=True)
class TokenMoves(Guidance):
    """Moves z by the maps of the tokens of the segments' phrases.

    A subclass calls `read_maps` in `prepare` and moves in `refine`, by `descend`.
    """

    scale: float = 20.0  # size of a move at the first step, along the gradient
    stop: float = 0.5  # fraction of the steps at which it ends
    decay: float = 0.5  # what the square of a move has fallen to, of its first size, at the end
    at: tuple[float, ...] = (0.0, 0.2, 0.4)  # fractions of the steps with as many moves as it takes
    until: tuple[float, ...] = (0.05, 0.5, 0.8)  # the attention that it then takes, for each of at
    limit: int = 20  # of the moves at one of those steps
    sharpness: float = 100.0  # factor on the maps before the softmax over tokens
    blur: float = 0.5  # standard deviation of the Gaussian over 3x3 pixels of a map
    sites: tuple[str, ...] = ("cross-attention",)  # wildcards; those of one grid are taken
    resolution: int = 0  # longer side of that grid; 0 is the nearest to a quarter of the latents'

    needs = ("text",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.at) != len(self.until):
            raise GuidekitError(f"{self.name}.at and until have as many numbers as each other")
        if not self.blur > 0 or self.limit < 0 or not 0 <= self.decay <= 1:
            raise GuidekitError(
                f"{self.name}: blur is above 0, limit at least 0, and decay lies from 0 to 1"
            )

    def read_maps(self, run: Run, conditions: Sequence[Condition]) -> tuple[int, int]:
        """Asks for the maps of all tokens; returns their grid (h, w).

        Raises GuidekitError without segments, and for a resolution that no site has.
        """
        require_segments(conditions, self.name)
        sites = sites_of_one_grid(run, list(self.sites), self.resolution, self.name)
        self._maps = TokenMaps(run, self, list(conditions), sites, every=True)
        (grid,) = {*sites.values()}
        return grid

    @property
    def wanted(self) -> Tensor:
        """Which of the K maps belong to which segment: (B, K, S) bool."""
        return self._maps.wanted

    def token_maps(self, step: Step, z: Tensor) -> Tensor:
        """The mean of the sites' maps, sharpened over the tokens and smoothed: (B, K, h, w)."""
        maps = average_maps(self._maps(step, z))
        return smoothed((self.sharpness * maps).softmax(1), self.blur)

    def amount(self, step: Step) -> float:
        """Size of a move at a step; the paper's moves are in units of the model's input."""
        share = 1 + (self.decay - 1) * step.index / max(step.n - 1, 1)
        return self.scale * math.sqrt(share) * step.level.norm**2

    def demands(self, step: Step) -> list[float]:
        """The attention that is demanded at a step before it is taken, if it is one of `at`."""
        calls = step.run.levels.step(step.index)
        pairs = zip(self.at, self.until, strict=True)
        return [attention for fraction, attention in pairs if round(fraction * step.n) in calls]
