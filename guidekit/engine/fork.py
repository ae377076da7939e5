"""Branches that equal another until their first edit: their rows join a denoiser call only there.

The perturbed branch of PAG, SEG or skip-layer guidance is the conditional one up to the block that
holds its first edited site, often the middle of the model. Until there one row stands for both; at
the entry of that block, and of those after it, the rows of what was computed before are repeated.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from guidekit.blocks import repeated_rows
from guidekit.engine.capture import Call, Part


class Fork:
    """The blocks from which on the late parts of a denoiser call have rows of their own.

    sources: number of each call to that of the call that it is until then, itself for the others.
    """

    def __init__(self, parts: Sequence[Part], sources: Sequence[int], blocks: Sequence[str]):
        self.parts, self.blocks = parts, frozenset(blocks)
        self._sizes = [part.size for part in parts]
        #: The calls that have rows from the start, and how many rows those are.
        self.early: list[Call] = []
        self.count = 0
        starts = {}
        for i, part in enumerate(parts):
            if sources[i] != i:
                part.size = 0
                continue
            starts[i] = self.count
            self.early.append(part.call)
            self.count += part.size
        self._order = tuple(
            starts[source] + row
            for source, size in zip(sources, self._sizes, strict=True)
            for row in range(size)
        )

    def entered(self, given: Any) -> Any:
        """Arguments of a block with rows for all parts; those that have them already stay."""
        for part, size in zip(self.parts, self._sizes, strict=True):
            part.size = size
        return repeated_rows(given, self.count, self._taken)

    def _taken(self, value: Tensor) -> Tensor:
        """The rows of all parts out of those of the early ones."""
        return value.index_select(0, _index(self._order, value.device))


@functools.lru_cache(maxsize=16)  # else every step copies it to the device
def _index(order: tuple[int, ...], device: torch.device) -> Tensor:
    """Which early row each row is."""
    return torch.tensor(order, device=device)


def fork(parts: Sequence[Part], blocks: Sequence[str]) -> Fork | None:
    """The fork of a denoiser call, None where all its parts differ from the start.

    blocks: those of the model between which rows do not mix, in the order in which they run.
    """
    calls = [part.call for part in parts]
    sources = [_source(calls, i) for i in range(len(calls))]
    late = [i for i, source in enumerate(sources) if source != i]
    if not late or not blocks:
        return None
    start = min(_first(calls[i], blocks) for i in late)
    if start in (0, len(blocks)):
        return None
    if any(_first_edit(calls[sources[i]], blocks) < start for i in late):
        return None
    return Fork(parts, sources, blocks[start:])


def _source(calls: Sequence[Call], number: int) -> int:
    """The call that a call is until its first edit: itself if no other of the group.

    A branch of some of the images may have fewer rows than its twin, which then is none.
    """
    for i, call in enumerate(calls):
        if call.branch.name == calls[number].twin and len(call.x) == len(calls[number].x):
            return i
    return number


def _first(call: Call, blocks: Sequence[str]) -> int:
    """Number of the first block in which a call reads or edits; 0 for a site outside of them."""
    sites = [site for wanted in call.wanted.values() for site in wanted]
    return min((_block(site, blocks) for site in sites), default=len(blocks))


def _first_edit(call: Call, blocks: Sequence[str]) -> int:
    """Number of the first block in which a call edits, that after the last for none."""
    sites = [site for edit in call.edits for site in edit.sites]
    return min((_block(site, blocks) for site in sites), default=len(blocks))


def _block(site: str, blocks: Sequence[str]) -> int:
    """Number of the block that a site is in, 0 for one outside of them."""
    inside = (i for i, block in enumerate(blocks) if site == block or site.startswith(f"{block}."))
    return next(inside, 0)
