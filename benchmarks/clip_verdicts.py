"""What SDG's tables say, confirmed or refuted by the rows of clip_guidance.py."""

import itertools

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
        ordering("a larger scale retrieves better", [r["top-1"] for r in scales]),
        ordering("a larger scale varies less", [-r["spread"] for r in scales]),
    ]


def image(by: dict[str, dict]) -> list[str]:
    """Image guidance beside ILVR (Tables 2 and 3)."""
    small, large = (by[f"content {s} noise"] for s in (0.2, 0.4))
    other = by["ILVR N=8"]
    return [
        ordering("a larger scale retrieves better", [small["top-1"], large["top-1"]]),
        ordering("image guidance varies more than ILVR", [other["spread"], large["spread"]]),
        ordering("image guidance retrieves better than ILVR", [other["top-1"], large["top-1"]]),
        ordering("its Frechet distance is smaller", [-other["Frechet"], -large["Frechet"]]),
    ]


def structure(by: dict[str, dict]) -> list[str]:
    """Position, against content guidance."""
    ratio = by["structure"]["mIoU"] / max(by["content"]["mIoU"], 1e-6)
    return [said("structure has 3 times the mIoU of content", ratio >= 3, ratio)]


def style(by: dict[str, dict]) -> list[str]:
    """Colours move, objects do not: two draws without guidance share silhouettes by chance only."""
    row = by["style, and structure of the unguided picture"]
    alone, none = by["style"]["colour distance"], by["unguided"]["colour distance"]
    return [
        said("style brings colours nearer", alone < none, alone / none),
        said("with structure it still does", row["colour distance"] < none,
             row["colour distance"] / none),
        said("and leaves objects where they are", row["same layout"] >= 0.5, row["same layout"]),
    ]  # fmt: skip


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


def ordering(what: str, values: list[float]) -> str:
    """Whether values rise as the paper's do."""
    rising = all(a < b for a, b in itertools.pairwise(values))
    falling = any(a > b for a, b in itertools.pairwise(values))
    numbers = ", ".join(f"{abs(v):.3f}" for v in values)
    return f"{'confirmed' if rising else 'refuted' if falling else 'undecided'}: {what} ({numbers})"
