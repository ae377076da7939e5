"""Which images a guidance acts on at a step; the others stay as they were without it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from guidekit.branches import Branch
from guidekit.errors import GuidekitError, blame
from guidekit.guidance import Guidance
from guidekit.step import Step

#: Hooks that are of a whole batch, which cannot be of some of its images.
WHOLE = ("begin", "jumps", "repeats", "solve")


def check_hooks(guidance: Guidance) -> None:
    """Raises GuidekitError for a guidance of some images with a hook that is of all."""
    whole = [hook for hook in WHOLE if guidance.overrides(hook)]
    if whole and guidance.overrides("acts_on"):
        raise GuidekitError(
            f"{guidance.name} acts on some images (acts_on), and its {whole[0]} is of all images "
            "of a batch; use one without the other"
        )


def acting(step: Step, guidance: Guidance) -> Tensor | None:
    """Which images (B,) it acts on at a step, asked once; None for all.

    It is left on the device that it was made on. Raises GuidekitError for what is not (B,) bool.
    """
    if not guidance.overrides("acts_on"):
        return None
    if guidance.name not in step.acting:
        with blame(guidance.name, "acts_on", step.index):
            mask = guidance.acts_on(step)
        count = len(step.run.seeds)
        if mask is not None and (mask.shape != (count,) or mask.dtype != torch.bool):
            raise GuidekitError(
                f"{guidance.name}.acts_on gives {tuple(mask.shape)} of {mask.dtype}; give one bool "
                f"for each of {count} images, or None"
            )
        step.acting[guidance.name] = mask
    return step.acting[guidance.name]


def any_of(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Images that one of several acts on; None for all."""
    if any(mask is None for mask in masks):
        return None
    found = masks[0]
    for mask in masks[1:]:
        found = found | (mask if mask.device == found.device else mask.to(found.device))
    return found


def own_branches_of(
    mask: Tensor, name: str, before: Sequence[Branch], after: list[Branch], same: bool
) -> list[Branch]:
    """The branches of a step, those that a guidance added being of its own images.

    same: those that were there are as they were. Raises GuidekitError where it did something else
    to them, which is done to all images.
    """
    added = [branch for branch in after if not any(branch is one for one in before)]
    if not same or len(added) + len(before) != len(after) or any(b.group == "main" for b in added):
        raise GuidekitError(
            f"{name} acts on some images (acts_on), and changes branches that are there, or which "
            "are combined, which is so for all; add branches of another group, and combine them in "
            "`combine`"
        )
    for branch in added:
        branch.images = (
            mask if branch.images is None else branch.images & mask.to(branch.images.device)
        )
    return after
