"""What the rows of benchmarks/cat.py take for what, and how much of it is right."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from guidekit import LabelSet
from guidekit.affinity import Affinity, Estimate
from guidekit.labels import VOID
from guidekit.worlds import prints, scenes

SOURCE = LabelSet("scenes", scenes.DENSE, things=scenes.CLASSES)
TARGET = LabelSet("prints", prints.DENSE, things=prints.CLASSES)
THINGS = len(prints.CLASSES)
Picks = Callable[[Affinity], Tensor]


def colour_right(target: int, source: int) -> bool:
    """Whether a source thing has a colour that a person would take for the target's."""
    wanted = prints.CLASSES[target].split()[0]
    return source != VOID and SOURCE.classes[source].split()[0] in prints.ACCEPTED[wanted]


def shape_right(target: int, source: int) -> bool:
    """Whether its shape is the target's too; four of eight silhouettes are in both worlds."""
    same = prints.SAME.get(prints.CLASSES[target].split()[1])
    return colour_right(target, source) and SOURCE.classes[source].split()[1] == same


def vote(found: Affinity) -> Tensor:
    """The vote, ties to segmentation."""
    return torch.tensor([v.to for v in found.votes()])


def vote_text(found: Affinity) -> Tensor:
    """The vote, ties to text."""
    return vote(replace(found, order=("text", "segmentation", "features")))


def fallback(found: Affinity) -> Tensor:
    """No vote: segmentation, and text where a class is unseen."""
    own = found.picks("segmentation")
    return torch.where(own == VOID, found.picks("text"), own)


def combined(found: Affinity) -> Tensor:
    """The mean of the estimates' similarities, each column standardised over what is allowed."""
    total = torch.zeros(len(SOURCE), len(TARGET), dtype=torch.float64)
    for name, own in found.estimates.items():
        scores = own.scores.log1p() if own.counts else own.scores
        kept = scores.where(found.allowed & scores.isfinite(), torch.nan)
        spread = (kept - kept.nanmean(0)).square().nanmean(0).sqrt()
        said = found.picks(name) != VOID
        total += ((kept - kept.nanmean(0)) / spread.clamp(min=1e-12)).nan_to_num() * said
    mean = Estimate(total, torch.ones(len(TARGET)))
    return replace(found, estimates={"mean": mean}).picks("mean")


def single(name: str) -> Picks:
    """One estimate alone."""
    return lambda found: found.picks(name)


def asking(texts: Estimate, row: Picks) -> Picks:
    """A row that has its names from another encoder."""
    return lambda found: row(replace(found, estimates=found.estimates | {"text": texts}))


def rows_of(unknown: Estimate, known: Estimate) -> dict[str, Picks]:
    """What every row takes for what: by one estimate, or by several.

    unknown, known: names by `scenes-clip`, whose captions hold none of the target's, and by
    `worlds-clip`, which has seen all; the vote asks MiniLM where no other is named.
    """
    return {
        "segmentation": single("segmentation"),
        "features": single("features"),
        "text, MiniLM": single("text"),
        "text, scenes-clip": asking(unknown, single("text")),
        "text, worlds-clip": asking(known, single("text")),
        "vote": vote,
        "vote, ties to text": vote_text,
        "vote, worlds-clip": asking(known, vote),
        "vote, worlds-clip, ties to text": asking(known, vote_text),
        "mean of similarities": combined,
        "segmentation, text where unseen": fallback,
    }


#: Those that are shown once more with the most probable class of a pixel alone.
NAMED = ("segmentation", "vote")
#: Those that models draw under.
DRAWN = (
    "segmentation",
    "features",
    "text, MiniLM",
    "text, worlds-clip",
    "vote",
    "vote, worlds-clip",
    "vote, worlds-clip, ties to text",
    "segmentation, text where unseen",
)


def most_probable(shares: Tensor) -> Tensor:
    """One for the largest of shares (N, H, W), void's among them, and zeros."""
    whole = torch.cat([1 - shares.sum(0, keepdim=True), shares])
    return torch.zeros_like(whole).scatter_(0, whole.argmax(0, keepdim=True), 1.0)[1:]


def right_colours(picks: Tensor) -> int:
    """How many of the 64 things have a right colour."""
    return sum(colour_right(*pair) for pair in enumerate(picks[:THINGS].tolist()))


def measured(found: Affinity, picks: Tensor) -> dict[str, int]:
    """How many of the 64 things are seen, got a right colour, and how the votes were decided."""
    seen = int((found.estimates["segmentation"].evidence[:THINGS] > 0).sum())
    pairs = list(enumerate(picks[:THINGS].tolist()))
    hows = Counter(v.how for v in found.votes()[:THINGS])
    return {
        "seen": seen,
        "colours": sum(colour_right(*pair) for pair in pairs),
        "shapes too": sum(shape_right(*pair) for pair in pairs),
        **{how: hows[how] for how in ("unanimous", "voted", "ordered", "alone")},
    }
