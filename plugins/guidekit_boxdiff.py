"""BoxDiff: phrases stand in their boxes, by moves of z that follow the strongest attention.

Xie, Li, Huang, Liu, Zhang, Zheng, Shou: BoxDiff: Text-to-Image Synthesis with Training-Free
Box-Constrained Diffusion, ICCV 2023, arXiv:2307.10816, eqs. 4 to 6: the strongest attention inside
the box grows, that outside falls, and what maps show along each axis ends where the box ends. The
loop is Attend-and-Excite's, whose early steps follow the first term alone, as in the released code,
whose numbers these are. Boxes are the segments' masks, cut at 0.5, on the grid of the maps.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guidekit import Guidance, GuidekitError, Run, Step, average_maps, hookimpl
from guidekit.toolbox import (
    TokenMaps,
    descend,
    require_segments,
    segment_masks,
    segment_strengths,
    sites_of_one_grid,
    smoothed,
)


@dataclass(kw_only=True)
class BoxDiff(Guidance):
    """Moves z until each token of the phrases is attended to inside its box and not outside."""

    plugin = "boxdiff"

    scale: float = 20.0  # size of a move at the first step, along the gradient
    stop: float = 0.5  # fraction of the steps at which it ends
    decay: float = 0.5  # what the square of a move has fallen to, of its first size, at the end
    share: float = 0.2  # of the pixels of the box, and of those around it, that count: the highest
    corner: int = 1  # pixels to each side of a box's ends where the third term looks
    at: tuple[float, ...] = (0.0, 0.2, 0.4)  # fractions of the steps with as many moves as it takes
    until: tuple[float, ...] = (0.05, 0.5, 0.8)  # attention inside that it then takes, for each
    limit: int = 20  # of the moves at one of those steps
    sharpness: float = 100.0  # factor on the maps before the softmax over tokens
    blur: float = 0.5  # standard deviation of the Gaussian over 3x3 pixels of a map
    sites: tuple[str, ...] = ("cross-attention",)  # wildcards; those of one grid are taken
    resolution: int = 0  # longer side of that grid; 0 is the nearest to a quarter of the latents'

    needs = ("text",)
    waived: ClassVar[dict[str, str]] = {
        "rows_on_scenes": "each of up to twenty moves at one step makes roundings about twice as "
        "large; with limit=5 the images are the same to 1e-8"
    }

    def __post_init__(self):
        super().__post_init__()
        if len(self.at) != len(self.until):
            raise GuidekitError(f"{self.name}.at and until have as many numbers as each other")
        fine = self.blur > 0 and self.limit >= 0 and 0 <= self.decay <= 1 and self.corner >= 0
        if not fine or not 0 < self.share <= 1:
            raise GuidekitError(
                f"{self.name}: blur and share are above 0, limit and corner at least 0, and share "
                "and decay at most 1"
            )

    def prepare(self, run: Run) -> None:
        """Finds tokens and sites, and lays out the boxes."""
        require_segments(run.conditions, self.name)
        sites = sites_of_one_grid(run, list(self.sites), self.resolution, self.name)
        self._maps = TokenMaps(run, self, run.conditions, sites, every=True)
        (grid,) = {*sites.values()}
        masks = segment_masks(run.conditions, *grid).to(run.device)
        self._boxes = (masks >= 0.5 * masks.amax((2, 3), keepdim=True)) & (masks > 0)
        # Of every pair of a token and a box (B, K, S).
        strengths = segment_strengths(run.conditions).to(run.device)
        self._pairs = self._maps.wanted * strengths[:, None]
        self._ends = [_ends(self._boxes.any(axis), self.corner) for axis in (2, 3)]

    def refine(self, step: Step, z: Tensor) -> Tensor:
        """z after the moves inside the boxes that `at` asks for, and one by all terms."""
        ratio = 1 + (self.decay - 1) * step.index / max(step.n - 1, 1)
        amount = self.scale * math.sqrt(ratio) * step.level.norm**2  # in units of the model's input
        for fraction, attention in zip(self.at, self.until, strict=True):
            if round(fraction * step.n) in step.run.levels.step(step.index):
                inside = functools.partial(self._energy, step, whole=False)
                enough = (1 - attention) * self._pairs.sum((1, 2))
                z = descend(step, self, z, inside, amount, self.limit, enough)
        return descend(step, self, z, functools.partial(self._energy, step), amount, 1)

    def _energy(self, step: Step, z: Tensor, whole: bool = True) -> Tensor:
        """Sum over tokens and their boxes (B,) of the first term, or of all."""
        maps = average_maps(self._maps(step, z))
        maps = smoothed((self.sharpness * maps).softmax(1), self.blur)  # (B, K, h, w)
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
