"""Branches of some images only: as few rows as that needs, then the output of all images."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from guidekit.branches import Branch
from guidekit.engine.capture import Call
from guidekit.errors import GuidekitError
from guidekit.reads import Eval


def check_images(branches: Sequence[Branch], count: int) -> None:
    """Raises GuidekitError for a mask that is not (count,), and where nothing can stand in."""
    names = [branch.name for branch in branches]
    for branch in branches:
        if branch.images is None:
            continue
        if branch.images.shape != (count,) or branch.images.dtype != torch.bool:
            raise GuidekitError(
                f"the branch {branch.name!r} has images {tuple(branch.images.shape)} of "
                f"{branch.images.dtype}; give one bool for each of {count}"
            )
        if branch.name == "cond" or "cond" not in names or branch.view is not None:
            raise GuidekitError(
                f"the branch {branch.name!r} is of some images, and the output of 'cond' stands in "
                "for the others; it is another branch than 'cond', without a view, beside it"
            )


def sparse(calls: Sequence[Call], edits_input: bool) -> list[tuple[int, Call]]:
    """The calls that are made, with their numbers: none of no image, fewer rows of some.

    A call that is read or edited keeps its rows, as hooks expect those of all images.
    """
    found = []
    for number, call in enumerate(calls):
        mask = call.branch.images
        whole = call.tapped or edits_input or not hasattr(call.text, "rows")
        if mask is None or whole or bool(mask.all()):
            found.append((number, call))
        elif mask.any():
            rows = mask.nonzero().flatten().to(call.x.device)
            lengths = [n for n, own in zip(call.lengths, mask.tolist(), strict=True) if own]
            own = {"x": call.x[rows], "text": call.text.rows(rows), "lengths": lengths}
            found.append((number, replace(call, **own)))
    return found


def dense(calls: Sequence[Call], made: dict[int, Eval]) -> list[Eval]:
    """An evaluation for every call; the output of "cond" stands in for images that it left out."""
    cond = next((e.out for e in made.values() if e.branch.name == "cond"), None)
    return [_whole(call, made.get(number), cond) for number, call in enumerate(calls)]


def _whole(call: Call, found: Eval | None, cond: Tensor | None) -> Eval:
    mask = call.branch.images
    if mask is None or bool(mask.all()):
        return found
    if found is None:
        return Eval(call.branch, cond)
    mask = mask.to(cond.device)
    if len(found.out) == len(cond):
        found.out = torch.where(mask[:, None, None, None], found.out, cond)
    else:
        found.out = cond.index_copy(0, mask.nonzero().flatten(), found.out)
        found.variance = None
    return found
