"""What the rows of benchmarks/cat.py take for what, and how much of it is right."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from guidekit.affinity import Affinity, Estimate
from guidekit.affinity.matrix import ORDER
from guidekit.labels import VOID
from guidekit.synthesis.data import PRINTS_LABELS as TARGET
from guidekit.synthesis.data import SOURCE_LABELS as SOURCE
from guidekit.worlds import prints

THINGS = len(prints.CLASSES)
SEEING = ("segmentation", "features")
#: Names by an encoder that knows sentences, and by one that has seen both worlds.
TEXTS = ("text, MiniLM", "text, worlds-clip")
#: The votes that models draw under, and the estimates that each asks.
VOTES = {
    "vote": (*SEEING, TEXTS[0]),
    "vote, worlds-clip": (*SEEING, TEXTS[1]),
    "vote, worlds-clip, ties to text": (*SEEING, TEXTS[1]),
}
FALLBACK = "segmentation, text where unseen"
#: The rows that models draw under.
DRAWN = (*SEEING, *TEXTS, *VOTES, FALLBACK)
#: Those that are shown once more with the most probable class of a pixel alone.
NAMED = ("segmentation", "vote")
Picks = Callable[[Affinity], Tensor]
Change = Callable[[Affinity], Affinity]


def same(found: Affinity) -> Affinity:
    """No change."""
    return found


@dataclass(frozen=True)
class Row:
    """What picks a source class for each target class, once the affinity is changed."""

    by: Picks
    change: Change = same

    def picks(self, found: Affinity) -> Tensor:
        """The source class for each target class (N_t,)."""
        return self.by(self.change(found))


def single(name: str) -> Picks:
    """One estimate alone."""
    return lambda found: found.picks(name)


def vote(found: Affinity) -> Tensor:
    """The vote, ties by the affinity's order."""
    return torch.tensor([own.to for own in found.votes()])


def asking(texts: Estimate) -> Change:
    """Names from another encoder."""
    return lambda found: replace(found, estimates=found.estimates | {"text": texts})


def ties_to_text(found: Affinity) -> Affinity:
    """The same with text before the others, as `guidekit affinity --first text` has it."""
    return replace(found, order=tuple(dict.fromkeys(("text", *ORDER))))


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


def rows_of(strange: Estimate, known: Estimate) -> dict[str, Row]:
    """All rows by name; text is MiniLM's where no other encoder is named.

    strange: names by `scenes-clip`, whose captions hold none of the target's. known: by
    `worlds-clip`, whose captions hold all.
    """
    both = asking(known)
    return {
        "segmentation": Row(single("segmentation")),
        "features": Row(single("features")),
        "text, MiniLM": Row(single("text")),
        "text, scenes-clip": Row(single("text"), asking(strange)),
        "text, worlds-clip": Row(single("text"), both),
        "vote": Row(vote),
        "vote, ties to text": Row(vote, ties_to_text),
        "vote, worlds-clip": Row(vote, both),
        "vote, worlds-clip, ties to text": Row(vote, lambda found: ties_to_text(both(found))),
        "mean of similarities": Row(combined),
        FALLBACK: Row(fallback),
    }


def most_probable(shares: Tensor) -> Tensor:
    """One for the largest of shares (N, H, W), void's among them, and zeros."""
    whole = torch.cat([1 - shares.sum(0, keepdim=True), shares])
    return torch.zeros_like(whole).scatter_(0, whole.argmax(0, keepdim=True), 1.0)[1:]


def colour_right(target: int, source: int) -> bool:
    """Whether a source thing has a colour that a person would take for the target's."""
    wanted = prints.CLASSES[target].split()[0]
    return source != VOID and SOURCE.classes[source].split()[0] in prints.ACCEPTED[wanted]


def shape_right(target: int, source: int) -> bool:
    """Whether its shape is the target's too; four of eight silhouettes are in both worlds."""
    same = prints.SAME.get(prints.CLASSES[target].split()[1])
    return colour_right(target, source) and SOURCE.classes[source].split()[1] == same


def right_colours(picks: Tensor) -> int:
    """How many of the 64 things have a right colour."""
    return sum(colour_right(*pair) for pair in enumerate(picks[:THINGS].tolist()))


def measured(row: Row, found: Affinity) -> dict[str, int]:
    """Of the 64 things: how many are seen, and how many got a right colour, and shape too.

    Of a vote also how it was decided.
    """
    picks = row.picks(found)
    line = {
        "seen": int((found.estimates["segmentation"].evidence[:THINGS] > 0).sum()),
        "colours": right_colours(picks),
        "shapes too": sum(shape_right(*pair) for pair in enumerate(picks[:THINGS].tolist())),
    }
    if row.by is not vote:
        return line
    hows = Counter(own.how for own in row.change(found).votes()[:THINGS])
    return line | {how: hows[how] for how in ("unanimous", "voted", "ordered", "alone")}
