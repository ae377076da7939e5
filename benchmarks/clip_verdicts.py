"""What SDG's tables say, confirmed or refuted by the rows of clip_guidance.py."""

import numpy as np


def words(part: str, rows: list[dict]) -> list[str]:
    """What was asked of the rows of a part, and whether it holds."""
    return VERDICTS[part]({row["method"]: row for row in rows}) if part in VERDICTS else []


def encoder(by: dict[str, dict]) -> list[str]:
    """Gains over the frozen encoder at ten levels."""
    gains = [row["gain"] for row in by.values()]
    middle = float(np.mean(gains[3:7]))
    return [
        said("noise-aware never below frozen - 0.02", min(gains) >= -0.02, min(gains)),
        said("at least +0.20 in the middle third", middle >= 0.2, middle),
    ]


def latents(by: dict[str, dict]) -> list[str]:
    """Which way to read latents."""
    middle = float(np.mean([row["gain"] for row in by.values()][3:7]))
    return [said("a stem names more than decoding, in the middle third", middle > 0, middle)]


def text(by: dict[str, dict]) -> list[str]:
    """Presence of what was asked, and the order of scales (Table 1)."""
    scales = [by[f"text {s} noise"] for s in (0.1, 0.2, 0.4)]
    best = max(scales, key=lambda row: row["colour and shape"])
    colour, both = best["colour"], best["colour and shape"]
    return [
        said("asked colour in 0.8", colour >= 0.8, colour),
        said("colour and shape together in 0.6", both >= 0.6, both),
        ordering("a larger scale retrieves better", scales, "top-1"),
        ordering("a larger scale varies less", scales[::-1], "spread"),
    ]


def image(by: dict[str, dict]) -> list[str]:
    """Image guidance beside ILVR (Tables 2 and 3)."""
    small, large = (by[f"content {s} noise"] for s in (0.2, 0.4))
    return [
        ordering("a larger scale retrieves better", [small, large], "top-1"),
        *(
            line
            for name in ("ILVR N=4", "ILVR N=8")
            for line in (
                ordering(f"image guidance varies more than {name}", [by[name], large], "spread"),
                ordering(
                    f"image guidance retrieves better than {name}", [by[name], large], "top-1"
                ),
                ordering(
                    f"its Frechet distance is below that of {name}", [large, by[name]], "Frechet"
                ),
            )
        ),
    ]


def structure(by: dict[str, dict]) -> list[str]:
    """Position, against content guidance."""
    ratio = by["structure"]["mIoU"] / max(by["content"]["mIoU"], 1e-6)
    return [said("structure has 3 times the mIoU of content", ratio >= 3, ratio)]


def style(by: dict[str, dict]) -> list[str]:
    """Colours move, objects do not: two draws without guidance share silhouettes by chance only."""
    held = by["structure of the unguided image"]
    lines = [
        said("style brings colours nearer", by["style"]["moved 95%"][0] > 0, by["style"]["moved"])
    ]
    for name in ("the same, and style 0.3", "the same, and style 0.6"):
        row, scale = by[name], name.split()[-1]
        lines += [
            said(f"so does {scale} beside structure", row["moved 95%"][0] > 0, row["moved"]),
            said(
                "at a layout as with structure alone, within the intervals",
                row["same layout 95%"][1] >= held["same layout 95%"][0],
                row["same layout"],
            ),
        ]
    return lines


def both(by: dict[str, dict]) -> list[str]:
    """Text and image together, against each alone."""
    alone = max(by["text"]["both"], by["image"]["both"])
    together = by["text and image"]["both"]
    return [said(f"both more often than either alone ({alone:.3f})", together > alone, together)]


VERDICTS = {
    "encoder": encoder,
    "latents": latents,
    "text": text,
    "image": image,
    "structure": structure,
    "style": style,
    "both": both,
}


def said(what: str, holds: bool, value: float) -> str:
    """One line of a verdict."""
    return f"{'holds' if holds else 'MISSED'}: {what} ({value:.3f})"


def ordering(what: str, rows: list[dict], column: str) -> str:
    """Whether a column rises over the rows as the paper's does, its ends beyond their intervals."""
    values = [row[column] for row in rows]
    ends = [row.get(f"{column} 95%") for row in (rows[0], rows[-1])]
    if None in ends:  # nothing says how far apart is far
        return f"undecided: {what} ({', '.join(f'{v:.3f}' for v in values)}, without intervals)"
    first, last = ends
    if values == sorted(values) and first[1] < last[0]:
        word = "confirmed"
    else:
        word = "refuted" if first[0] > last[1] else "undecided"
    return f"{word}: {what} ({', '.join(f'{v:.3f}' for v in values)})"
