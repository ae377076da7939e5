"""Attend-and-Excite: every phrase gets some pixel that attends to it, by moves of z itself.

Chefer, Alaluf, Vinker, Wolf, Cohen-Or: Attend-and-Excite: Attention-Based Semantic Guidance for
Text-to-Image Diffusion Models, SIGGRAPH 2023, arXiv:2301.13826. Algorithm 1: before a step is
taken, z moves against the gradient of the worst token's loss 1 - max A, once, and at three early
steps again and again until every token's largest attention is high enough.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import Condition, Run, Segment, Step, hookimpl
from guidekit.toolbox import TokenMoves, descend, segment_strengths


@dataclass(kw_only=True)
class AttendAndExcite(TokenMoves):
    """Moves z until each token of the phrases is attended to somewhere.

    Phrases are those of the segments, whose masks it does not read, or `words`.
    """

    plugin = "attend-and-excite"

    words: tuple[str, ...] = ()  # of the prompt, to be excited in place of the segments' phrases

    def prepare(self, run: Run) -> None:
        """Finds the tokens of the phrases, and asks for the maps of all tokens."""
        conditions = [self._worded(c) for c in run.conditions]
        self.read_maps(run, conditions)
        self._any = self.wanted.any(2)  # (B, K)
        strengths = segment_strengths(conditions).to(run.device)
        own = strengths[:, None].expand(self.wanted.shape)
        found = own.masked_fill(~self.wanted, -math.inf).amax(2)
        self._factors = found.masked_fill(~self._any, 0.0)  # (B, K)

    def _worded(self, condition: Condition) -> Condition:
        """The condition with the option's words for segments."""
        if not self.words:
            return condition
        whole = torch.ones(1, 1)
        return dataclasses.replace(condition, segments=tuple(Segment(w, whole) for w in self.words))

    def refine(self, step: Step, z: Tensor) -> Tensor:
        """z after one move, and at the steps of `at` after as many as it takes (Algorithm 1)."""
        limit, enough, until = 1, 0.0, -math.inf
        for attention in self.demands(step):
            limit, enough = self.limit + 1, 1 - attention
            until = enough
        loss = functools.partial(self._loss, step, enough)
        return descend(step, self, z, loss, self.amount(step), limit, until, after=1)

    def _loss(self, step: Step, enough: float, z: Tensor) -> Tensor:
        """The worst token's loss of every image (B,): 1 - max of its map.

        A strength is a factor on what is above `enough`, so that it does not change the demand.
        """
        above = 1 - self.token_maps(step, z).amax((2, 3)) - enough
        losses = enough + self._factors * above
        return losses.masked_fill(~self._any, -math.inf).amax(1)

    @classmethod
    def example(cls) -> "AttendAndExcite":
        """A few moves a step."""
        return cls(limit=2)


@hookimpl
def register_guidance(register):
    """Offers `attend-and-excite`."""
    register("attend-and-excite", AttendAndExcite)
