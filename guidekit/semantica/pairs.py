"""Which two pictures of a page are a pair: those alike, but not copies.

Semantica (arXiv:2405.14857) keeps pairs whose DINOv2 class tokens have a cosine from 0.3 to 0.9.
Other encoders have another scale: there `quantiles` of all pairs' cosines are the bounds.

Pairs stay on disk, and their order is computed: memory does not grow with them in training.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.images import save_picture
from guidekit.references import to_pixels
from guidekit.semantica.data import Pages, save_text
from guidekit.untrusted import check_weights, read_json

LOW, HIGH = 0.3, 0.9  # of DINOv2, the paper's
COPY = 1 - 1e-5  # cosine of one picture with itself, but for rounding; quantiles leave it out
FINE = 20_000  # bins over cosines from -1 to 1, for quantiles
BINS = 200  # of the picture
ROUNDS = 4  # of the shuffle
MOST = 64  # pictures that are paired with each other; pairs grow with the square


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


def _groups(pages: Pages) -> Iterator[np.ndarray]:
    """The rows of every page; a page of more than MOST, such as a class, is dealt into groups."""
    for rows in pages.members():
        if len(rows) > MOST:
            rows = np.random.Generator(np.random.Philox(key=int(rows[0]))).permutation(rows)
        yield from np.array_split(rows, -(-len(rows) // MOST))


def _cosines(pages: Pages) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Rows of every group (m,) and the cosines between them (m, m)."""
    for rows in _groups(pages):
        (pooled,) = pages.rows(rows.tolist(), "pooled")
        unit = F.normalize(pooled.float(), dim=1)
        yield rows, unit @ unit.T


def histogram(pages: Pages) -> np.ndarray:
    """Number of pairs by cosine, (FINE,) from -1 to 1."""
    counts = np.zeros(FINE, np.int64)
    for rows, cosine in _cosines(pages):
        above = cosine[tuple(np.triu_indices(len(rows), 1))].numpy()
        counts += np.histogram(above.clip(-1, 1), FINE, (-1, 1))[0]
    return counts


def bounds_at(counts: np.ndarray, quantiles: tuple[float, float]) -> tuple[float, float]:
    """The cosines below which the given shares of all pairs lie, to the width of a bin."""
    below = np.cumsum(counts) / max(counts.sum(), 1)
    edges = np.linspace(-1, 1, len(counts) + 1)
    low, high = (int(np.searchsorted(below, q)) for q in quantiles)
    return float(edges[low if quantiles[0] > 0 else 0]), float(edges[min(high + 1, len(counts))])


def find_pairs(
    pages: Pages,
    low: float | None = None,
    high: float | None = None,
    quantiles: tuple[float, float] | None = None,
    out: Path | None = None,
) -> Filtered:
    """Writes pairs.safetensors, filter.json and histogram.png into `out`, by default `filter`.

    A page of more than 64 pictures is dealt at random into groups of that many at most, within
    which they are paired. low, high: cosines to keep; None for no bound. quantiles: shares of the
    pairs that say them instead, copies apart. Raises GuidekitError when no pair is left, and for
    quantiles beside low or high.
    """
    asked = request(pages, low, high, quantiles)
    counts = histogram(pages)
    if quantiles is not None:
        low, high = bounds_at(counts, quantiles)
        high = min(high, COPY)
    low, high = (-2.0 if low is None else low), (2.0 if high is None else high)
    found = []
    for rows, cosine in _cosines(pages):
        keep = (cosine >= low) & (cosine <= high)
        keep.fill_diagonal_(False)
        first, second = keep.nonzero(as_tuple=True)
        found.append(np.stack([rows[first], rows[second]], 1).astype(np.int32))
    pairs = np.concatenate(found) if found else np.zeros((0, 2), np.int32)
    result = Filtered(low, high, int(counts.sum()), len(pairs) // 2, asked)
    out = pages.folder / "filter" if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_picture(picture(counts, result), out / "histogram.png")
    if not len(pairs):
        raise GuidekitError(
            f"none of {result.total} pairs has a cosine from {low:g} to {high:g}; see "
            f"{out / 'histogram.png'}, and give other bounds or quantiles"
        )
    (out / "filter.json").unlink(missing_ok=True)  # it says that the pairs are whole
    path = out / "pairs.safetensors"
    save_file({"pairs": torch.from_numpy(pairs)}, f"{path}.part")
    os.replace(f"{path}.part", path)
    table = asdict(result) | {
        "share": result.share,
        "unreadable": pages.unreadable,
        "histogram": _coarse(counts).tolist(),
    }
    save_text(out / "filter.json", json.dumps(table))
    return result


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
    pages: Pages, low: float | None, high: float | None, quantiles: tuple[float, float] | None
) -> dict:
    """What a filter is asked, as filter.json keeps it. Raises GuidekitError as `check_bounds`."""
    check_bounds(low, high, quantiles)
    chosen = None if quantiles is None else list(quantiles)
    return {
        "low": low,
        "high": high,
        "quantiles": chosen,
        "pictures": len(pages),
        "pages": pages.facts,
    }


def answered(folder: Path, asked: dict) -> bool:
    """Whether `folder` holds the pairs of that request; not if filter.json cannot be read."""
    if not (folder / "pairs.safetensors").exists():
        return False
    try:
        table = read_json(folder / "filter.json")
    except (OSError, ValueError):
        return False
    return isinstance(table, dict) and table.get("asked") == asked


def _coarse(counts: np.ndarray) -> np.ndarray:
    """Counts of the picture's bins."""
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


def shuffled(place: int, count: int, key: int) -> int:
    """Where `place` goes in a permutation of range(count) that `key` chooses, without a table.

    A Feistel network of four rounds permutes the numbers of an even number of bits; those beyond
    count are sent on until they fall below (Black, Rogaway 2002, "Ciphers with arbitrary finite
    domains", cycle walking).
    """
    half = max((count - 1).bit_length() + 1, 2) // 2
    while True:
        left, right = divmod(place, 1 << half)
        for turn in range(ROUNDS):
            mixed = hashlib.blake2b(struct.pack("<QQQ", key, turn, right), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "big") % (1 << half))
        place = (left << half) | right
        if place < count:
            return place


class Episodes:
    """Pairs of pictures of one page, in an order that is a function of the number alone.

    folder: where `find_pairs` wrote them. Raises GuidekitError if it did not.
    """

    def __init__(self, pages: Pages, folder: Path | None = None):
        path = (pages.folder / "filter" if folder is None else Path(folder)) / "pairs.safetensors"
        if not path.exists():
            raise GuidekitError(f"{path.parent} has no pairs; find_pairs makes them")
        check_weights(path)
        self.pages, self._file = pages, safe_open(path, "pt")
        self._pairs = self._file.get_slice("pairs")

    def __len__(self) -> int:
        return self._pairs.get_shape()[0]

    def pair(self, number: int) -> tuple[int, int]:
        """Rows of the condition and of the picture to draw; every epoch has another order."""
        epoch, place = divmod(number, len(self))
        row = shuffled(place, len(self), epoch)
        first, second = self._pairs[row : row + 1][0].tolist()
        return first, second

    def batch(self, numbers: range, feature: str = "tokens") -> tuple[Tensor, Tensor]:
        """States (B, T, D) of the conditions and pixels (B, 3, H, W) in [-1, 1] to draw.

        feature: "tokens", or "pooled" for the global feature, whose T is 1.
        """
        conditions, targets = zip(*(self.pair(n) for n in numbers), strict=True)
        (states,) = self.pages.rows(list(conditions), feature)
        (pictures,) = self.pages.rows(list(targets), "pictures")
        states = states.float()
        return states[:, None] if states.ndim == 2 else states, to_pixels(pictures)
