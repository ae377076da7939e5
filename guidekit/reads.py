"""What guidances read and edit: wishes for maps and features, by whom, and what came of them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.branches import Branch
from guidekit.errors import GuidekitError


@dataclass(eq=False, frozen=True)
class AttentionRead:
    """A wish for attention maps of a branch."""

    #: (B, T, S), a map per column: one-hot tokens, or sums over a segment's tokens.
    weights: Tensor
    #: The modules to read, with the grid (h, w) of each.
    sites: dict[str, tuple[int, int]]
    #: Keep the heads apart.
    per_head: bool = False
    #: (B, T) bool, the keys that take part in the softmax; None for all.
    tokens: Tensor | None = None
    #: (E, D), text states of further keys that take part in the softmax of the map only; the
    #: model's output does not see them.
    extra: Tensor | None = None
    #: Grid (h, w) to which logits are resized before the softmax; None for each site's own.
    resize: tuple[int, int] | None = None
    #: Name of the branch that is read.
    branch: str = "cond"

    @property
    def plain(self) -> bool:
        """Whether its maps are those of the call itself, which come out of the same pass."""
        changes = (self.tokens, self.extra, self.resize)
        return not self.per_head and all(change is None for change in changes)

    def shape(self, site: str) -> tuple[int, int]:
        """Grid (h, w) of its maps of a site."""
        return self.resize or self.sites[site]


@dataclass(eq=False, frozen=True)
class FeatureRead:
    """A wish for features of a branch."""

    #: Blocks, by name or wildcard.
    sites: tuple[str, ...]
    #: Name of the branch that is read.
    branch: str = "cond"


#: Name of a tensor of an evaluation: "out", "variance", or the id of a read and a site.
Key = str | tuple[int, str]


@dataclass(eq=False)
class Eval:
    """What one denoiser call gave for one branch: its output and what was read on the way."""

    #: The branch that was evaluated.
    branch: Branch
    #: The model's output (B, C, h, w); None after a call that ended at its last site.
    out: Tensor | None
    _read: dict[tuple[int, str], Tensor] = field(default_factory=dict, repr=False)
    #: Further channels of the output, a learned variance (B, C, h, w).
    variance: Tensor | None = None
    #: Which implementation of attention ran at the sites that were read.
    implementations: dict[str, str] = field(default_factory=dict, repr=False)
    #: The model's type, where the output is in float32 while it has a graph.
    narrow: torch.dtype | None = None

    def attention(self, read: AttentionRead) -> dict[str, Tensor]:
        """Maps per site: (B, S, h, w), or (B, heads, S, h, w) where the read is per head.

        Raises GuidekitError for a read that this call was not asked for.
        """
        return self._found(read)

    def features(self, read: FeatureRead) -> dict[str, Tensor]:
        """Features per site (B, C, h, w); raises GuidekitError as `attention` does."""
        return self._found(read)

    def _found(self, read: AttentionRead | FeatureRead) -> dict[str, Tensor]:
        if any((id(read), site) not in self._read for site in read.sites):
            raise GuidekitError(
                f"the branch {self.branch.name!r} was evaluated without this read, which is of "
                f"{read.branch!r}; reads of `step.denoise` are asked for with main=False, others "
                "come with the step's own evaluations"
            )
        return {site: self._read[id(read), site] for site in read.sites}

    def tensors(self) -> dict[Key, Tensor]:
        """All tensors that the call gave, by what `put` takes."""
        named: list[tuple[Key, Tensor | None]] = [("out", self.out), ("variance", self.variance)]
        return {key: value for key, value in [*named, *self._read.items()] if value is not None}

    def put(self, key: Key, value: Tensor) -> None:
        """Exchanges one of them."""
        if isinstance(key, str):
            setattr(self, key, value)
        else:
            self._read[key] = value

    def release(self) -> None:
        """Lets the graph go, and gives the output the model's own type."""
        for key, value in self.tensors().items():
            self.put(key, value.detach())
        if self.narrow and self.out is not None:
            self.out = self.out.to(self.narrow)


@dataclass(frozen=True)
class Asked:
    """A read and the guidance that asked for it; main: in the step's own calls."""

    owner: object
    read: AttentionRead | FeatureRead
    main: bool


class Reads:
    """The ledger of a run: which guidance reads and edits what, by object."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self._edits: list[tuple[object, str, frozenset[str]]] = []  # owner, kind, sites

    def add(self, owner: object, read: AttentionRead | FeatureRead, main: bool) -> None:
        """Notes a wish; main=False: only in the guidance's own calls of `step.denoise`."""
        self.asked.append(Asked(owner, read, main))

    def tap(self, owner: object, kind: str, sites: Iterable[str]) -> None:
        """Notes that calls at the sites are shown to `owner`; kind: "attention" or "block"."""
        kept = [e for e in self._edits if e[0] is not owner or e[1] != kind]
        self._edits = [*kept, (owner, kind, frozenset(sites))]

    def of(
        self, owners: Iterable[object], main: bool = True, branch: str | None = None
    ) -> list[AttentionRead | FeatureRead]:
        """The reads of some guidances, of one branch or of all, in the order of asking."""
        known = list(owners)
        return [
            a.read
            for a in self.asked
            if a.main == main and _among(a.owner, known) and branch in (None, a.read.branch)
        ]

    def readers(self, owners: Iterable[object]) -> list[object]:
        """Those of some guidances that read in the step's own calls."""
        return [o for o in owners if any(a.main and a.owner is o for a in self.asked)]

    def edited(self, owner: object, kind: str) -> frozenset[str]:
        """Sites of a kind whose calls are shown to `owner`."""
        return frozenset().union(*(s for o, k, s in self._edits if o is owner and k == kind))

    def edits(self, owner: object) -> bool:
        """Whether any call is shown to `owner`."""
        return any(o is owner for o, _, _ in self._edits)

    def sites(self, owners: Iterable[object], kind: str) -> list[str]:
        """Sites of a kind that some guidances read, in any call, or edit; sorted."""
        known, cls = list(owners), AttentionRead if kind == "attention" else FeatureRead
        read = {
            site
            for a in self.asked
            if isinstance(a.read, cls) and _among(a.owner, known)
            for site in a.read.sites
        }
        return sorted(read.union(*(self.edited(o, kind) for o in known)))

    def all_sites(self, owner: object) -> list[str]:
        """Every module that a guidance reads or edits, sorted."""
        return sorted({s for kind in ("attention", "block") for s in self.sites([owner], kind)})


def _among(one: object, owners: list[object]) -> bool:
    """Whether `one` is one of the owners; `in` would compare the fields of dataclasses."""
    return any(one is owner for owner in owners)


def average_maps(
    maps: dict[str, Tensor],
    size: tuple[int, int] | None = None,
    pick: Callable[[list[Tensor]], Tensor] | None = None,
) -> Tensor:
    """Mean of maps (B, S, h, w) over sites at the largest grid among them, or at `size`.

    Bilinear enlargement as in ZestGuide (Couairon et al. 2023, section 3.2).
    """
    grids = [(m.shape[-2], m.shape[-1]) for m in maps.values()]
    size = size or max(grids, key=math.prod)
    resized = [
        m if m.shape[-2:] == size else F.interpolate(m, size, mode="bilinear")
        for m in maps.values()
    ]
    return pick(resized) if pick else torch.stack(resized).mean(0)
