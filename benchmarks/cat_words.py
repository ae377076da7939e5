"""What the rows of benchmarks/cat.py say of the lecture's order, in words."""


def said(part: str, lines: list[dict], many: int) -> list[str]:
    """What the rows say of the lecture's order, in words."""
    counts = sorted({line["shots"] for line in lines} - {0, many})
    found = {(line["method"], line["shots"]): line for line in lines}
    told = []
    for count in counts:
        own = {name: line for (name, shots), line in found.items() if shots == count}
        estimates = {n: own[n] for n in ("segmentation", "features", "text") if n in own}
        best = max(estimates.values(), key=lambda line: line["mIoU"])
        told.append(
            f"{count} shots: random {_place(own, estimates)}; the vote against the best "
            f"estimate ({best['method']}): mIoU {_against(own['vote'], best, 'mIoU', 1)}, Frechet "
            f"{_against(own['vote'], best, 'Frechet', -1)}"
        )
        if part == "fine-tuned":
            told.append(
                f"{count} shots: the vote against scratch: mIoU "
                f"{_against(own['vote'], own['scratch'], 'mIoU', 1)}, Frechet "
                f"{_against(own['vote'], own['scratch'], 'Frechet', -1)}"
            )
    return told


def _place(own: dict[str, dict], estimates: dict[str, dict]) -> str:
    lowest = all(own["random"]["mIoU"] < line["mIoU"] for line in estimates.values())
    has = "has the lowest mIoU, as" if lowest else "has not the lowest mIoU, unlike"
    return f"{has} in the lecture"


def _against(a: dict, b: dict, key: str, sign: int) -> str:
    """Better, worse, or not told apart: whether the intervals overlap."""
    (low, high), (other_low, other_high) = a[f"{key} 95%"], b[f"{key} 95%"]
    if low <= other_high and other_low <= high:
        return "not told apart"
    return "better" if (a[key] - b[key]) * sign > 0 else "worse"
