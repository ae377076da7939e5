"""BoxDiff: phrases stand in their boxes, by moves of z that follow the strongest attention.

Xie, Li, Huang, Liu, Zhang, Zheng, Shou: BoxDiff: Text-to-Image Synthesis with Training-Free
Box-Constrained Diffusion, ICCV 2023, arXiv:2307.10816, eqs. 4 to 6: the strongest attention inside
the box grows, that outside falls, and what maps show along each axis ends where the box ends. The
loop is Attend-and-Excite's, whose early steps follow the first term alone, as in the released code.
Boxes are the segments' masks, cut at 0.5, on the grid of the maps.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guidekit import GuidekitError, Run, Step, hookimpl
from guidekit.toolbox import TokenMoves, descend, segment_masks, segment_strengths


@dataclass(kw_only=True)
class BoxDiff(TokenMoves):
    """Moves z until each token of the phrases is attended to inside its box and not outside."""

    plugin = "boxdiff"

    share: float = 0.2  # of the pixels of the box, and of those around it, that count: the highest
    corner: int = 1  # pixels to each side of a box's ends where the third term looks

    waived: ClassVar[dict[str, str]] = {
        "rows_on_scenes": "each of up to twenty moves at one step makes roundings about twice as "
        "large; with limit=5 the images are the same to 1e-8"
    }

    def __post_init__(self):
        super().__post_init__()
        if self.corner < 0 or not 0 < self.share <= 1:
            raise GuidekitError(
                f"{self.name}: corner is at least 0, and share above 0 and at most 1"
            )

    def prepare(self, run: Run) -> None:
        """Finds tokens and sites, and lays out the boxes."""
        grid = self.read_maps(run, run.conditions)
        masks = segment_masks(run.conditions, *grid).to(run.device)
        self._boxes = (masks >= 0.5 * masks.amax((2, 3), keepdim=True)) & (masks > 0)
        # Of every pair of a token and a box (B, K, S).
        strengths = segment_strengths(run.conditions).to(run.device)
        self._pairs = self.wanted * strengths[:, None]
        self._ends = [_ends(self._boxes.any(axis), self.corner) for axis in (2, 3)]

    def refine(self, step: Step, z: Tensor) -> Tensor:
        """z after the moves inside the boxes that `at` asks for, and one by all terms."""
        amount = self.amount(step)
        for attention in self.demands(step):
            inside = functools.partial(self._energy, step, whole=False)
            enough = (1 - attention) * self._pairs.sum((1, 2))
            z = descend(step, self, z, inside, amount, self.limit, enough)
        return descend(step, self, z, functools.partial(self._energy, step), amount, 1)

    def _energy(self, step: Step, z: Tensor, whole: bool = True) -> Tensor:
        """Sum over tokens and their boxes (B,) of the first term, or of all."""
        maps = self.token_maps(step, z)  # (B, K, h, w)
        boxes = self._boxes[:, None]
        losses = 1 - highest(maps[:, :, None], boxes, self.share)
        if whole:
            losses = losses + highest(maps[:, :, None], ~boxes, self.share)
            losses = losses + sum(self._corners(maps, axis) for axis in (0, 1))
        return (self._pairs.to(losses.dtype) * losses).sum((1, 2))

    def _corners(self, maps: Tensor, axis: int) -> Tensor:
        """How far projections on an axis differ from the box's at its ends: (B, K, S)."""
        near = self._ends[axis][:, None].to(maps.dtype)
        box = self._boxes.any(axis + 2)[:, None].to(maps.dtype)
        apart = (maps.amax(axis + 2)[:, :, None] - box).abs()
        return (near * apart).sum(-1) / near.sum(-1).clamp(min=1)

    @classmethod
    def example(cls) -> "BoxDiff":
        """A few moves a step."""
        return cls(limit=2)


def highest(maps: Tensor, where: Tensor, share: float) -> Tensor:
    """Mean of the highest values of maps (..., h, w) among pixels `where`: a share of those, (...).

    At least one pixel of each, 0 where there is none.
    """
    count = where.sum((-2, -1))
    most = (share * count).long().clamp(min=1).minimum(count)[..., None]
    values = maps.masked_fill(~where, -math.inf).flatten(-2).sort(-1, descending=True).values
    taken = torch.arange(values.shape[-1], device=maps.device) < most
    return torch.where(taken, values, 0.0).sum(-1) / most[..., 0].clamp(min=1)


def _ends(line: Tensor, width: int) -> Tensor:
    """Which places of projections (B, S, n) lie within `width` of the first or the last that is."""
    places = torch.arange(line.shape[-1], device=line.device)
    first = torch.where(line, places, line.shape[-1]).amin(-1, keepdim=True)
    last = torch.where(line, places, -1).amax(-1, keepdim=True)
    near = ((places - first).abs() <= width) | ((places - last).abs() <= width)
    return near & line.any(-1, keepdim=True)


@hookimpl
def register_guidance(register):
    """Offers `boxdiff`."""
    register("boxdiff", BoxDiff)
