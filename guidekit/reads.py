"""What guidances read and edit: wishes for maps and features, by whom, and what came of them."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.branches import Branch


@dataclass(eq=False, frozen=True)
class AttentionRead:
    """A wish for attention maps of the conditional branch.

    weights (B, T, S): a map per column, one-hot tokens or sums over a segment's tokens. sites: the
    modules to read, with the grid (h, w) of each. per_head keeps the heads apart. tokens (B, T)
    bool: the keys that take part in the softmax, all if None. extra (E, D): text states of further
    keys that take part in the softmax of the map only; the model's output does not see them.
    resize: grid (h, w) to which logits are resized before the softmax, None for each site's own.
    """

    weights: Tensor
    sites: dict[str, tuple[int, int]]
    per_head: bool = False
    tokens: Tensor | None = None
    extra: Tensor | None = None
    resize: tuple[int, int] | None = None

    @property
    def plain(self) -> bool:
        """Whether its maps are those of the call itself, which come out of the same pass."""
        changes = (self.tokens, self.extra, self.resize)
        return not self.per_head and all(change is None for change in changes)

    def shape(self, site: str) -> tuple[int, int]:
        """Grid (h, w) of its maps of a site."""
        return self.resize or self.sites[site]

    @functools.cached_property
    def columns(self) -> frozenset[int]:
        """Tokens that have weight in some picture; looked up once, as that waits for the GPU."""
        return frozenset(self.weights.ne(0).any(0).any(-1).nonzero().flatten().tolist())


@dataclass(eq=False, frozen=True)
class FeatureRead:
    """A wish for features of the conditional branch at the blocks that the wildcards name."""

    sites: tuple[str, ...]


@dataclass(eq=False)
class Eval:
    """What one denoiser call gave for one branch: its output and what was read on the way."""

    branch: Branch
    out: Tensor
    _read: dict[tuple[int, str], Tensor] = field(default_factory=dict, repr=False)
    variance: Tensor | None = None  # further channels of the output: a learned variance

    def attention(self, read: AttentionRead) -> dict[str, Tensor]:
        """Maps per site: (B, S, h, w), or (B, heads, S, h, w) where the read is per head."""
        return {site: self._read[id(read), site] for site in read.sites}

    def features(self, read: FeatureRead) -> dict[str, Tensor]:
        """Features per site (B, C, h, w)."""
        return {site: self._read[id(read), site] for site in read.sites}


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

    def of(self, owners: Iterable[object], main: bool = True) -> list[AttentionRead | FeatureRead]:
        """The reads of some guidances, in the order in which they were asked for."""
        known = list(owners)
        return [a.read for a in self.asked if a.main == main and _among(a.owner, known)]

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
