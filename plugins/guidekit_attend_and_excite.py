"""Attend-and-Excite: every phrase gets some pixel that attends to it, by moves of z itself.

Chefer, Alaluf, Vinker, Wolf, Cohen-Or: Attend-and-Excite: Attention-Based Semantic Guidance for
Text-to-Image Diffusion Models, SIGGRAPH 2023, arXiv:2301.13826. Algorithm 1: before a step is
taken, z moves against the gradient of the worst token's loss 1 - max A, once, and at three early
steps again and again until every token's largest attention is high enough. Numbers are those of
the released code; layers of one grid count, a quarter of the latents' side, which is 16x16 there.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import (
    Condition,
    Guidance,
    GuidekitError,
    Run,
    Segment,
    Step,
    average_maps,
    hookimpl,
)
from guidekit.toolbox import TokenMaps, descend, require_segments, sites_of_one_grid, smoothed


@dataclass(kw_only=True)
class AttendAndExcite(Guidance):
    """Moves z until each token of the phrases is attended to somewhere.

    Phrases are those of the segments, whose masks it does not read, or `words`.
    """

    plugin = "attend-and-excite"

    scale: float = 20.0  # size of a move at the first step, along the gradient
    stop: float = 0.5  # fraction of the steps at which it ends
    words: tuple[str, ...] = ()  # of the prompt, to be excited in place of the segments' phrases
    decay: float = 0.5  # what the square of a move has fallen to, of its first size, at the end
    at: tuple[float, ...] = (0.0, 0.2, 0.4)  # fractions of the steps with as many moves as it takes
    until: tuple[float, ...] = (0.05, 0.5, 0.8)  # the attention that it then takes, for each of at
    limit: int = 20  # of the moves at one of those steps
    sharpness: float = 100.0  # factor on the maps before the softmax over tokens
    blur: float = 0.5  # standard deviation of the Gaussian over 3x3 pixels of a map
    sites: tuple[str, ...] = ("cross-attention",)  # wildcards; those of one grid are taken
    resolution: int = 0  # longer side of that grid; 0 is the nearest to a quarter of the latents'

    needs = ("text",)

    def __post_init__(self):
        super().__post_init__()
        if len(self.at) != len(self.until):
            raise GuidekitError(f"{self.name}.at and until have as many numbers as each other")
        if not self.blur > 0 or self.limit < 0 or not 0 <= self.decay <= 1:
            raise GuidekitError(
                f"{self.name}: blur is above 0, limit at least 0, and decay lies from 0 to 1"
            )

    def prepare(self, run: Run) -> None:
        """Finds the tokens of the phrases, and asks for the maps of all tokens."""
        conditions = [self._worded(c) for c in run.conditions]
        require_segments(conditions, self.name)
        sites = sites_of_one_grid(run, list(self.sites), self.resolution, self.name)
        self._maps = TokenMaps(run, self, conditions, sites, every=True)
        self._wanted = self._maps.wanted.any(2)  # (B, K)

    def _worded(self, condition: Condition) -> Condition:
        """The condition with the option's words for segments."""
        if not self.words:
            return condition
        whole = torch.ones(1, 1)
        return dataclasses.replace(condition, segments=tuple(Segment(w, whole) for w in self.words))

    def refine(self, step: Step, z: Tensor) -> Tensor:
        """z after one move, and at the steps of `at` after as many as it takes (Algorithm 1)."""
        # The paper's moves are in units of the model's input.
        share = 1 + (self.decay - 1) * step.index / max(step.n - 1, 1)
        amount = self.scale * math.sqrt(share) * step.level.norm**2
        limit, until = 1, -math.inf
        for fraction, attention in zip(self.at, self.until, strict=True):
            if round(fraction * step.n) in step.run.levels.step(step.index):
                limit, until = self.limit + 1, 1 - attention
        loss = functools.partial(self._loss, step)
        return descend(step, self, z, loss, amount, limit, until, after=1)

    def _loss(self, step: Step, z: Tensor) -> Tensor:
        """The worst token's loss of every image (B,): 1 - max of its smoothed map."""
        maps = average_maps(self._maps(step, z))  # (B, K, h, w)
        words = (self.sharpness * maps).softmax(1)
        losses = 1 - smoothed(words, self.blur).amax((2, 3))
        return losses.masked_fill(~self._wanted, -math.inf).amax(1)

    @classmethod
    def example(cls) -> "AttendAndExcite":
        """A few moves a step."""
        return cls(limit=2)


@hookimpl
def register_guidance(register):
    """Offers `attend-and-excite`."""
    register("attend-and-excite", AttendAndExcite)
