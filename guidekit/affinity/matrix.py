"""Affinities: estimates of what stands for what, their vote, and what is made of it."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from guidekit.affinity.fold import fold
from guidekit.errors import GuidekitError
from guidekit.images import replacing
from guidekit.labels import VOID, LabelMap, LabelSet, parse_label_set
from guidekit.system.untrusted import read_object, read_weights

FORMAT = 1
CONFIG, SCORES = "affinity.json", "affinity.safetensors"
#: Estimates by how much they are trusted where no two agree; ours, the paper does not say.
ORDER = ("segmentation", "features", "text")
TAU = 0.05  # of soft affinities from similarities; ours
# Of a class's pixels that a segmenter must see as something, else it abstains; ours. So little,
# because even a thousandth names the right class of `prints` more often than not.
LEAST = 1e-4
VOTE, HAND = "vote", "hand"


@dataclass(frozen=True, eq=False)
class Estimate:
    """How alike every source class and every target class are, by one kind of evidence.

    scores: (N_s, N_t), numbers of pixels where `counts`, which may be broken, else similarities,
    -inf for source classes of which it knows nothing. evidence: (N_t,), what each column rests on:
    pixels, or 1; 0 where it abstains.
    """

    scores: Tensor
    evidence: Tensor
    counts: bool = False


@dataclass(frozen=True)
class Vote:
    """What became of a target class.

    to: index of the source class, VOID if nothing spoke for one. how: "by hand", "unanimous",
    "voted" (two or more agree), "ordered" (none agree: the first in the order), "alone" or "none".
    named: what each estimate that did not abstain says.
    """

    to: int
    how: str
    named: dict[str, int]


@dataclass(frozen=True, eq=False)
class Affinity:
    """Which classes of a source set stand for those of a target set.

    by_hand: weights (N_s,) of target classes that a person mapped, by index; they always win.
    order: of the estimates, where no two agree. by_kind: things go to things alone, and stuff to
    stuff, where both sets say which is which and the source has some.
    """

    source: LabelSet
    target: LabelSet
    estimates: Mapping[str, Estimate]
    by_hand: Mapping[int, Tensor] = field(default_factory=dict)
    order: tuple[str, ...] = ORDER
    by_kind: bool = True

    def __post_init__(self) -> None:
        shape = (len(self.source), len(self.target))
        for name, estimate in self.estimates.items():
            if estimate.scores.shape != shape or estimate.evidence.shape != shape[1:]:
                raise GuidekitError(
                    f"the estimate {name!r} is {tuple(estimate.scores.shape)}; these label sets "
                    f"need {shape}"
                )
        for target, weights in self.by_hand.items():
            if not 0 <= target < shape[1] or weights.shape != shape[:1] or not weights.sum() > 0:
                raise GuidekitError(
                    f"the mapping by hand of class {target} does not fit; there are {shape[1]} "
                    f"classes, each with {shape[0]} weights"
                )

    @property
    def allowed(self) -> Tensor:
        """Which source classes may stand for which target classes: (N_s, N_t) bool."""
        whole = torch.ones(len(self.source), len(self.target), dtype=torch.bool)
        sides = self.source.is_thing, self.target.is_thing
        if not self.by_kind or sides[0] is None or sides[1] is None:
            return whole
        same = sides[0][:, None] == sides[1][None]
        return torch.where(same.any(0), same, whole)

    def picks(self, name: str) -> Tensor:
        """The source class that an estimate names for each target class (N_t,), VOID: abstains.

        The first of equal ones; none where it knows nothing of those that may stand for it. Raises
        GuidekitError for a name that there is not.
        """
        estimate = self._estimate(name)
        scores = estimate.scores.masked_fill(~self.allowed, float("-inf"))
        best, place = scores.max(0)
        silent = (estimate.evidence <= 0) | (best == float("-inf"))
        if estimate.counts:
            silent |= ~(self.evidence(name) >= LEAST * estimate.evidence)
        return place.masked_fill(silent, VOID)

    def evidence(self, name: str) -> Tensor:
        """What an estimate of each target class (N_t,) rests on.

        Of counts the pixels that were seen as classes that may stand for it, else as `Estimate`.
        """
        estimate = self._estimate(name)
        if estimate.counts:
            return (estimate.scores * self.allowed).sum(0)
        return estimate.evidence

    def _estimate(self, name: str) -> Estimate:
        if name not in self.estimates:
            there = ", ".join(self.estimates) or "none"
            also = "" if name == VOTE else f", and their {VOTE}"
            raise GuidekitError(f"no estimate {name!r}; there are {there}{also}")
        return self.estimates[name]

    def votes(self) -> list[Vote]:
        """What became of every target class."""
        picks = {name: self.picks(name).tolist() for name in self._ordered()}
        return [self._vote(t, picks) for t in range(len(self.target))]

    def _ordered(self) -> list[str]:
        known = [name for name in self.order if name in self.estimates]
        return known + [name for name in self.estimates if name not in known]

    def _vote(self, target: int, picks: dict[str, list[int]]) -> Vote:
        named = {name: own[target] for name, own in picks.items() if own[target] != VOID}
        if target in self.by_hand:
            return Vote(int(self.by_hand[target].argmax()), "by hand", named)
        if not named:
            return Vote(VOID, "none", named)
        # Of equally many the first in the order: Counter keeps the order of its keys.
        (best, times), *_ = Counter(named.values()).most_common()
        if len(named) == 1:
            return Vote(best, "alone", named)
        how = "unanimous" if times == len(named) else "voted" if times > 1 else "ordered"
        return Vote(best, how, named)

    def hard(self, by: str = VOTE) -> Tensor:
        """The source class of each target class (N_t,), by the vote or by one estimate.

        Raises GuidekitError that names the classes for which nothing speaks.
        """
        found = self._picked(by)
        self._check_said([t for t, s in enumerate(found.tolist()) if s == VOID])
        return found

    def _picked(self, by: str) -> Tensor:
        """`hard`, VOID where nothing speaks for a class."""
        if by == VOTE:
            return torch.tensor([vote.to for vote in self.votes()])
        found = self.picks(by)
        for target, weights in self.by_hand.items():
            found[target] = weights.argmax()
        return found

    def _check_said(self, silent: list[int]) -> None:
        if silent:
            names = ", ".join(repr(self.target.classes[t]) for t in silent[:8])
            more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
            raise GuidekitError(
                f"nothing says what stands for {names}{more} of {self.target.name!r}; estimate the "
                "affinity with shots that show them, with --text, or with a line of --hand such as "
                '{"x": "y"} (guidekit affinity)'
            )

    def matrix(self, by: str = VOTE) -> Tensor:
        """The hard affinity as zeros and ones (N_s, N_t); raises as `hard`."""
        one_hot = torch.zeros(len(self.source), len(self.target), dtype=torch.float64)
        return one_hot.scatter_(0, self.hard(by)[None], 1.0)

    def soft(self, tau: float = TAU, by: str = VOTE) -> Tensor:
        """Shares (N_s, N_t), whose columns sum to 1. tau: above 0; smaller is harder.

        Of counts their shares, of similarities softmax(similarity / tau); of the vote the mean over
        the estimates that do not abstain. By hand the given weights. Raises as `hard`.
        """
        if not tau > 0:
            raise GuidekitError(f"tau must be above 0, not {tau:g}; for one class each use hard()")
        total, spoke = self._summed(tau, by)
        self._check_said((spoke == 0).nonzero()[:, 0].tolist())
        return total / spoke

    def said(self, by: str = VOTE) -> Tensor:
        """Shares as `soft` has them; columns of zeros where nothing speaks."""
        total, spoke = self._summed(TAU, by)
        return total / torch.where(spoke == 0, 1.0, spoke)

    def _summed(self, tau: float, by: str) -> tuple[Tensor, Tensor]:
        """Shares (N_s, N_t) summed over the estimates that speak, and how many those are (N_t,)."""
        names = self._ordered() if by == VOTE else [by]
        total = torch.zeros(len(self.source), len(self.target), dtype=torch.float64)
        spoke = torch.zeros(len(self.target), dtype=torch.float64)
        for name in names:
            own = self.picks(name) != VOID
            total += torch.where(own, self._shares(name, tau), 0.0)
            spoke += own
        for target, weights in self.by_hand.items():
            total[:, target], spoke[target] = weights, weights.sum()
        return total, spoke

    def _shares(self, name: str, tau: float) -> Tensor:
        estimate = self._estimate(name)
        scores = estimate.scores.double()
        if estimate.counts:
            counts = scores * self.allowed
            return counts / counts.sum(0).clamp(min=1e-12)
        return (scores / tau).masked_fill(~self.allowed, float("-inf")).softmax(0)

    def remap(self, given: LabelMap, by: str = VOTE) -> LabelMap:
        """A target map as a source map; void stays void.

        Raises GuidekitError for a map of another label set, and for a class of it for which nothing
        speaks.
        """
        if given.labels.classes != self.target.classes:
            raise GuidekitError(
                f"the map is of label set {given.labels.name!r}, and this affinity is for "
                f"{self.target.name!r}; give a map of that set, or another affinity"
            )
        picked = self._picked(by)
        self._check_said([t for t in given.present if t != VOID and picked[t] == VOID])
        return LabelMap(torch.cat([picked, torch.tensor([VOID])])[given.ids], self.source)

    def fold(
        self,
        weight: Tensor,
        palette: Tensor | None = None,
        unshuffle: int = 1,
        start: int | Literal["last"] = 0,
        further: int = 0,
    ) -> Tensor:
        """A first layer's weight (O, C, kh, kw) that reads target maps; see `affinity.fold`.

        palette: `source.colours` for a layer that reads a map in colours. start: "last" for a layer
        that reads an image before the map.
        """
        return fold(weight, self.matrix(), palette, unshuffle, start, further)

    def save(self, folder: str | Path) -> Path:
        """Writes affinity.json and affinity.safetensors: scores, evidence and shares (`said`)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: e.scores.contiguous() for name, e in self.estimates.items()}
        tensors |= {f"{name}.evidence": e.evidence for name, e in self.estimates.items()}
        tensors |= {f"{by}.soft": self.said(by) for by in (*self.estimates, VOTE)}
        tensors |= {f"{HAND}.{t}": weights.double() for t, weights in self.by_hand.items()}
        with replacing(folder / SCORES) as part:
            save_file(tensors, part)
        with replacing(folder / CONFIG) as part:
            part.write_text(json.dumps(self.table(), indent=1) + "\n", encoding="utf-8")
        return folder

    def table(self) -> dict[str, Any]:
        """The label sets, and what became of every class, as JSON has them."""
        names = self.source.classes
        evidence = {name: self.evidence(name) for name in self.estimates}
        return {
            "format": FORMAT,
            "source": self.source.table(),
            "target": self.target.table(),
            "order": list(self.order),
            "by_kind": self.by_kind,
            "counts": [name for name, e in self.estimates.items() if e.counts],
            "votes": {
                self.target.classes[t]: {
                    "to": None if vote.to == VOID else names[vote.to],
                    "how": vote.how,
                    "named": {by: names[s] for by, s in vote.named.items()},
                    "evidence": {name: float(own[t]) for name, own in evidence.items()},
                }
                for t, vote in enumerate(self.votes())
            },
        }


def load_affinity(folder: str | Path) -> Affinity:
    """The affinity of a folder. Raises GuidekitError for a folder that is none or is damaged."""
    folder = Path(folder)
    try:
        table, tensors = read_object(folder / CONFIG), read_weights(folder / SCORES)
    except (FileNotFoundError, NotADirectoryError):
        raise GuidekitError(
            f"{folder} is no affinity ({CONFIG} and {SCORES}); make one with guidekit affinity"
        ) from None
    if table.get("format") != FORMAT:
        raise GuidekitError(f"the affinity {folder} has another format; estimate it again")
    try:
        sides = {s: parse_label_set(table[s], s, f"{folder}: {s}") for s in ("source", "target")}
        hands = {k: v for k, v in tensors.items() if k.startswith(f"{HAND}.")}
        names = [k for k in tensors if f"{k}.evidence" in tensors]
        estimates = {
            n: Estimate(tensors[n], tensors[f"{n}.evidence"], n in table["counts"]) for n in names
        }
        order, by_kind = tuple(map(str, table["order"])), bool(table["by_kind"])
        by_hand = {int(k.rpartition(".")[2]): weights for k, weights in hands.items()}
        return Affinity(sides["source"], sides["target"], estimates, by_hand, order, by_kind)
    except (KeyError, TypeError, ValueError) as error:
        raise GuidekitError(
            f"the affinity {folder} is damaged ({error}); estimate it again"
        ) from None


def parse_hand(
    table: object, source: LabelSet, target: LabelSet, where: str = "by hand"
) -> dict[int, Tensor]:
    """A mapping by hand: target names to a source name, or to weights by source name.

    Raises GuidekitError that names the class that there is not.
    """
    if not isinstance(table, dict):
        raise GuidekitError(f'{where}: write an object such as {{"lawn": "grass"}}')
    found = {}
    for name, to in table.items():
        weights = torch.zeros(len(source), dtype=torch.float64)
        pairs = [*to.items()] if isinstance(to, dict) else [(to, 1)]
        for other, share in pairs:
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if not isinstance(other, str) or not number or not 0 < share < float("inf"):
                raise GuidekitError(
                    f"{where}: {name!r} goes to a class, or to classes with weights above 0, not "
                    f"{to!r}"
                )
            weights[source.index(other)] = share
        if not weights.any():
            raise GuidekitError(f"{where}: {name!r} goes to no class; name one")
        found[target.index(name)] = weights / weights.sum()
    return found
