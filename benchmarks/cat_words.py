"""What the rows of benchmarks/cat.py say of the lecture's order, in words."""

from cat_models import ESTIMATES


def said(part: str, lines: list[dict], paired: list[dict]) -> list[str]:
    """What rows, and what the vote has over others layout by layout, say of the lecture's order."""
    over = {(line["the vote less"], line["shots"]): line for line in paired}
    told = []
    for count in sorted({shots for _, shots in over}):
        own = {line["method"]: line for line in lines if line["shots"] == count}
        best = max(ESTIMATES, key=lambda name: own[name]["mIoU"])
        told.append(
            f"{count} shots: random {_place(own)}; the vote against the best estimate ({best}): "
            f"{_against(over[best, count])}"
        )
        if part == "fine-tuned":
            told.append(
                f"{count} shots: the vote against scratch: {_against(over['scratch', count])}"
            )
    return told


def _place(own: dict[str, dict]) -> str:
    lowest = all(own["random"]["mIoU"] < own[name]["mIoU"] for name in ESTIMATES)
    has = "has the lowest mIoU, as" if lowest else "has not the lowest mIoU, unlike"
    return f"{has} in the lecture"


def _against(line: dict) -> str:
    """Better, worse, or not told apart: whether a difference's interval holds zero."""
    words = []
    for key, sign in (("mIoU", 1), ("Frechet", -1)):
        low, high = line[f"{key} 95%"]
        apart = "better" if line[key] * sign > 0 else "worse"
        words.append(f"{key} {'not told apart' if low <= 0 <= high else apart}")
    return ", ".join(words)
