"""What the rows of benchmarks/cat.py say of the lecture's order, in words.

The lecture's slide has one target of 100 images, without intervals: its mIoU puts the vote before
each estimate and random after them with nothing trained; after training random has more mIoU than
features, and by far the largest Frechet distance. Beside that, what the vote has over training from
nothing.
"""

from itertools import pairwise

from cat_rows import SEEING, TEXTS, VOTES
from cat_tables import LESS

ESTIMATES = (*SEEING, *TEXTS)
#: The estimates of the slide, the largest mIoU first.
LECTURE = {
    "training-free": ("text", "segmentation", "features"),
    "fine-tuned": ("segmentation", "text", "features"),
}
#: By what random is worse than each estimate on the slide, and whether more of it is better.
RANDOM = {"training-free": ("mIoU", True), "fine-tuned": ("Frechet", False)}


def said(part: str, lines: list[dict], paired: list[dict]) -> list[str]:
    """What rows, and what a row has over another layout by layout, say of the lecture's order."""
    over = {(line["row"], line["less"], line["shots"]): line for line in paired}
    told = []
    for count in sorted({shots for *_, shots in over}):
        own = {line["method"]: line for line in lines if line["shots"] == count}
        verdicts = [f"random {_place(part, own)}"]
        verdicts += [f"the estimates by mIoU are {_order(part, own, text)}" for text in TEXTS]
        for vote, estimates in VOTES.items():
            best = max(estimates, key=lambda name: own[name]["mIoU"])
            against = _against(over[vote, best, count])
            verdicts.append(f'"{vote}" against the best of its estimates, {best} {against}')
        if part == "fine-tuned":
            verdicts.append(f'"vote" against scratch {_against(over["vote", "scratch", count])}')
        told += [f"{count} shots: {verdict}" for verdict in verdicts]
    return told


def further(lines: list[dict]) -> list[str]:
    """Whether the vote is nearer to real prints than training from nothing, by many images."""
    told = []
    for line in lines:
        how = _told(line[LESS], line[f"{LESS} 95%"], -1)
        told.append(
            f'{line["shots"]} shots, {line["images"]} images: "vote" against scratch '
            f"({_times(line)}): Frechet {how}, nearer in {line['nearer in']}"
        )
    return told


def _times(line: dict) -> str:
    """What an interval is over, beside layouts."""
    count = line["seeds"]
    return f"{count} times" if count > 1 else "once, so over layouts alone"


def _order(part: str, own: dict[str, dict], text: str) -> str:
    """The estimates in their order, names by one encoder; ~ between two whose intervals overlap.

    That says less than paired differences would, as rows share their layouts: > is sure, ~ is not.
    """
    found = tuple(sorted((*SEEING, text), key=lambda name: -own[name]["mIoU"]))
    lecture = tuple(text if name == "text" else name for name in LECTURE[part])
    told, apart = found[0], [_apart(own[a], own[b], "mIoU") for a, b in pairwise(found)]
    for name, sure in zip(found[1:], apart, strict=True):
        told += f" {'>' if sure else '~'} {name}"
    there = "" if found == lecture else f" {' > '.join(lecture)}"
    like = "as in" if all(apart) else "the means as in"
    return f"{told}, {'in' if there else like} the lecture{there}"


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
    """Better, worse, or not told apart, in mIoU and in Frechet distance."""
    signs = (("mIoU", 1), ("Frechet", -1))
    told = [f"{key} {_told(line[key], line[f'{key} 95%'], sign)}" for key, sign in signs]
    return f"({_times(line)}): {', '.join(told)}"


def _told(value: float, bounds: tuple[float, float], sign: int) -> str:
    """Whether a difference's interval holds zero; `sign` is that of a better one."""
    low, high = bounds
    return "not told apart" if low <= 0 <= high else "better" if value * sign > 0 else "worse"
