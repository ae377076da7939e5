"""Which two images of a page are a pair: those alike, but not copies.

Semantica (arXiv:2405.14857) keeps pairs whose DINOv2 class tokens have a cosine from 0.3 to 0.9.
Other encoders have another scale: there `quantiles` of all pairs' cosines are the bounds.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from guidekit.errors import GuidekitError
from guidekit.semantica.data import Store
from guidekit.system.untrusted import read_json
from guidekit.train.durable import put_text

LOW, HIGH = 0.3, 0.9  # of DINOv2, the paper's
COPY = 1 - 1e-5  # cosine of one image with itself, but for rounding; quantiles leave it out
FINE = 20_000  # bins over cosines from -1 to 1, for quantiles
BINS = 200  # of the image


@dataclass(frozen=True)
class Filtered:
    """What the filter found: bounds, number of pairs before and after, share kept.

    asked: the bounds that it was given, and what the pages are made of.
    """

    low: float
    high: float
    total: int
    kept: int
    asked: dict

    @property
    def share(self) -> float:
        """Share of the pairs that were kept."""
        return self.kept / max(self.total, 1)


def bounds_at(counts: np.ndarray, quantiles: tuple[float, float]) -> tuple[float, float]:
    """The cosines below which the given shares of all pairs lie, to the width of a bin."""
    below = np.cumsum(counts) / max(counts.sum(), 1)
    edges = np.linspace(-1, 1, len(counts) + 1)
    low, high = (int(np.searchsorted(below, q)) for q in quantiles)
    return float(edges[low if quantiles[0] > 0 else 0]), float(edges[min(high + 1, len(counts))])


def save_filtered(
    out: Path, result: Filtered, counts: np.ndarray, pages: list[int], unreadable: int
) -> None:
    """Writes filter.json, which says that the rest is whole. pages: how many each partition has."""
    table = asdict(result) | {
        "share": result.share,
        "unreadable": unreadable,
        "histogram": _coarse(counts).tolist(),
        "pages": pages,
    }
    put_text(out / "filter.json", json.dumps(table))


def check_bounds(
    low: float | None, high: float | None, quantiles: tuple[float, float] | None
) -> None:
    """Raises GuidekitError if quantiles are given beside the bounds that they would replace."""
    if quantiles is not None and (low, high) != (None, None):
        given = ", ".join(
            f"{k} = {v:g}" for k, v in (("low", low), ("high", high)) if v is not None
        )
        raise GuidekitError(
            f"quantiles say low and high, so {given} would be ignored; leave one out"
        )


def request(
    store: Store,
    totals: dict[str, int],
    low: float | None,
    high: float | None,
    quantiles: tuple[float, float] | None,
) -> dict:
    """What a filter is asked, as filter.json keeps it. Raises GuidekitError as `check_bounds`."""
    check_bounds(low, high, quantiles)
    chosen = None if quantiles is None else list(quantiles)
    return {
        "low": low,
        "high": high,
        "quantiles": chosen,
        "pictures": totals["rows"],
        "pages": store.facts,
    }


def answered(folder: Path, asked: dict) -> bool:
    """Whether `folder` holds the pairs of that request; not if filter.json cannot be read."""
    try:
        table = read_json(folder / "filter.json")
    except (OSError, ValueError):
        return False
    return isinstance(table, dict) and table.get("asked") == asked


def _coarse(counts: np.ndarray) -> np.ndarray:
    """Counts of the image's bins."""
    return counts.reshape(BINS, -1).sum(1)


def picture(counts: np.ndarray, result: Filtered) -> Image.Image:
    """Counts (FINE,) as a histogram with the kept range in colour and the share kept in words."""
    counts = _coarse(counts)
    width, height, margin = 4 * BINS, 240, 24
    image = Image.new("RGB", (width, height + 2 * margin), "white")
    draw = ImageDraw.Draw(image)
    for i, count in enumerate(counts):
        middle = -1 + (2 * i + 1) / BINS
        kept = result.low <= middle <= result.high
        tall = round(height * count / max(counts.max(), 1))
        draw.rectangle(
            (4 * i, margin + height - tall, 4 * i + 2, margin + height),
            fill=(40, 80, 200) if kept else (190, 190, 190),
        )
    for value in np.linspace(-1, 1, 9):
        draw.text(
            (min((value + 1) / 2 * width, width - 30), margin + height + 4),
            f"{value:g}",
            fill="black",
        )
    text = f"{result.kept} of {result.total} pairs kept ({result.share:.1%}), cosine"
    draw.text((6, 4), f"{text} {result.low:.2f} to {result.high:.2f}", fill="black")
    return image
