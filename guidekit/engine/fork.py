"""Branches that are another's until their first edit: their rows join a denoiser call only there.

The perturbed branch of PAG, SEG or skip-layer guidance is the conditional one up to the block that
holds its first edited site, often the middle of a UNet. Until there one row stands for both; at the
entry of that block, and of those after it, the rows of what was computed before are repeated.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from guidekit.engine.capture import Call, Part


class Fork:
    """The blocks from which on the late parts of a denoiser call have rows of their own.

    sources: number of each call to that of the call that it is until then, itself for the others.
    """

    def __init__(self, parts: Sequence[Part], sources: Sequence[int], blocks: Sequence[str]):
        self.parts, self.blocks = parts, frozenset(blocks)
        self._sizes = [part.size for part in parts]
        early = [i for i, source in enumerate(sources) if source == i]
        starts, self.count = {}, 0
        for i in early:
            starts[i] = self.count
            self.count += self._sizes[i]
        self._order = tuple(
            starts[source] + row
            for source, size in zip(sources, self._sizes, strict=True)
            for row in range(size)
        )
        self.early = [parts[i].call for i in early]
        for part in parts:
            part.size = 0 if part.call not in self.early else part.size

    def entered(self, given: Any) -> Any:
        """Arguments of a block with rows for all parts; those that have them already stay."""
        for part, size in zip(self.parts, self._sizes, strict=True):
            part.size = size
        return self._repeated(given)

    def _repeated(self, value: Any) -> Any:
        """Tensors with a row per image of the early parts, also inside containers, in full."""
        if isinstance(value, Tensor):
            early = value.ndim > 0 and len(value) == self.count
            return value.index_select(0, _index(self._order, value.device)) if early else value
        if isinstance(value, dict):
            return {key: self._repeated(inner) for key, inner in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._repeated(inner) for inner in value)
        return value


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
    # A block that is read or edited whole is cut into the rows of the parts outside of the fork.
    if any(site in call.wanted["block"] for call in calls for site in blocks[start:]):
        return None
    return Fork(parts, sources, blocks[start:])


def _source(calls: Sequence[Call], number: int) -> int:
    """The call that a call is until its first edit: itself if no other of the group."""
    twin = calls[number].twin
    names = [call.branch.name for call in calls]
    return names.index(twin) if twin in names else number


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
