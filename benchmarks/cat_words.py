"""What the rows of benchmarks/cat.py say of the lecture's order, in words.

The lecture's slide has one target of 100 images, without intervals: its mIoU puts the vote before
each estimate and random after them with nothing trained; after training random has more mIoU than
features, and by far the largest Frechet distance.
"""

from itertools import pairwise

from cat_models import ESTIMATES
from cat_tables import SAME_RATE

#: The estimates of the slide, the largest mIoU first.
LECTURE = {
    "training-free": ("text, MiniLM", "segmentation", "features"),
    "fine-tuned": ("segmentation", "text, MiniLM", "features"),
}
#: By what random is worse than each estimate on the slide, and whether more of it is better.
RANDOM = {"training-free": ("mIoU", True), "fine-tuned": ("Frechet", False)}


def said(part: str, lines: list[dict], paired: list[dict]) -> list[str]:
    """What rows, and what the vote has over others layout by layout, say of the lecture's order."""
    over = {(line["the vote less"], line["shots"]): line for line in paired}
    told = []
    for count in sorted({shots for _, shots in over}):
        own = {line["method"]: line for line in lines if line["shots"] == count}
        best = max(ESTIMATES, key=lambda name: own[name]["mIoU"])
        verdicts = [
            f"random {_place(part, own)}",
            f"the estimates by mIoU are {_order(part, own)}",
            f"the vote against the best estimate ({best}): {_against(over[best, count])}",
        ]
        if part == "fine-tuned":
            names = ("scratch", SAME_RATE)
            verdicts += [f"the vote against {n}: {_against(over[n, count])}" for n in names]
        told += [f"{count} shots: {verdict}" for verdict in verdicts]
    return told


def _order(part: str, own: dict[str, dict]) -> str:
    """The estimates in their order; ~ between two whose intervals overlap.

    That says less than paired differences would, as rows share their layouts: > is sure, ~ is not.
    """
    found = tuple(sorted(ESTIMATES, key=lambda name: -own[name]["mIoU"]))
    told = found[0]
    for before, name in pairwise(found):
        told += f" {'>' if _apart(own[before], own[name], 'mIoU') else '~'} {name}"
    there = "" if found == LECTURE[part] else f" {' > '.join(LECTURE[part])}"
    return f"{told}, {'in' if there else 'as in'} the lecture{there}"


def _apart(one: dict, other: dict, key: str) -> bool:
    """Whether two intervals hold nothing in common."""
    (low, high), (below, above) = one[f"{key} 95%"], other[f"{key} 95%"]
    return high < below or above < low


def _place(part: str, own: dict[str, dict]) -> str:
    key, more = RANDOM[part]
    sign = 1 if more else -1
    worst = all(own["random"][key] * sign < own[name][key] * sign for name in ESTIMATES)
    is_so, like = ("is", "as") if worst else ("is not", "unlike")
    close = [name for name in ESTIMATES if not _apart(own["random"], own[name], key)]
    sure = f"; not told apart from {' and '.join(close)}" if close else ""
    return f"{is_so} the worst in {key}, {like} in the lecture{sure}"


def _against(line: dict) -> str:
    """Better, worse, or not told apart: whether a difference's interval holds zero."""
    words = []
    for key, sign in (("mIoU", 1), ("Frechet", -1)):
        low, high = line[f"{key} 95%"]
        apart = "better" if line[key] * sign > 0 else "worse"
        words.append(f"{key} {'not told apart' if low <= 0 <= high else apart}")
    return ", ".join(words)
