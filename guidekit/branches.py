"""Branches of a step: the conditional one, the null, a region, a window; how they combine."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guidekit.errors import GuidekitError


@dataclass(eq=False)
class Branch:
    """One row group of the denoiser's batch: the conditional one, the null, a region, a window.

    prompts: one text per image, or one class or image (`Denoiser.content`). weight: the default
    combination is base + sum of weight * (out - base) over the branches with a weight; the base is
    the branch whose weight is None. x: own carried input (B, C, h, w) in place of z. view: window
    (top, left, height, width) of the latents that this branch sees. group: branches combine with
    those of their own group; the combinations of other groups than "main" are for the guidance that
    made them to use. images: (B,) bool, which images it is evaluated for; the output of "cond"
    stands in for the others, so that they have no difference to it; None for all. text: what the
    model is told in place of the encoded prompts (`run.text`), with as many tokens as you like; it
    has a denoiser call of its own. controlled: whether the controls beside the denoiser act.
    """

    name: str
    prompts: list[str | int]
    weight: float | None = None
    null: bool = False
    x: Tensor | None = None
    view: tuple[int, int, int, int] | None = None
    group: str = "main"
    images: Tensor | None = None
    text: Any = None
    controlled: bool = True

    def of(self, z: Tensor) -> Tensor:
        """What this branch sees of the carried z (B, C, h, w): its own input, its window."""
        x = z if self.x is None else self.x
        if self.view is None:
            return x
        top, left, height, width = self.view
        return x[..., top : top + height, left : left + width]


def combination(branches: list[Branch], outs: dict[str, Tensor]) -> Tensor:
    """Base plus the weighted differences to it: diffusers' formula for null and cond.

    Raises GuidekitError for branches of which none has the weight None.
    """
    base = next((outs[b.name] for b in branches if b.weight is None), None)
    if base is None:
        names = ", ".join(b.name for b in branches)
        raise GuidekitError(f"no base among the branches {names}: one needs the weight None")
    combined = base
    for branch in branches:
        if branch.weight is not None:
            combined = combined + branch.weight * (outs[branch.name] - base)
    return combined


def windowed(x: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """The window of x (..., H, W); one that goes past the right edge goes on at the left."""
    over = left + width - x.shape[-1]
    x = torch.cat([x, x[..., :over]], -1) if over > 0 else x
    return x[..., top : top + height, left : left + width]
