"""How far the draw of pages is from the draw of pairs, on the pages of a recipe.

The paper draws a page, then a pair in it; the shipped `scenes-semantica` was trained when all
kept pairs were equally likely. Both are distributions over the same pairs, and half the sum of the
absolute differences of their weights is the share of a training's episodes that would be others.
"""

import tempfile
from pathlib import Path

import numpy as np

from guidekit.semantica.episodes import PageIndex
from guidekit.semantica.pages import PagesOptions, make_episodes
from guidekit.zoo.shipped import ZOO


def draw_rows(pages: int, size: int) -> list[dict]:
    """The row of the built-in recipe's pages, of which there are so many here."""
    encoder = str(ZOO / "scenes-semantica" / "encoder")
    options = PagesOptions(encoder=encoder, pages=pages, quantiles=(0.02, 0.98))
    with tempfile.TemporaryDirectory() as folder:
        make_episodes(options, Path(folder), size, quiet=True)
        index = PageIndex(next(Path(folder).rglob("filter.json")).parent)
        weights = [pair_weights(index.pairs(number)) for number in range(len(index))]
    pairs = sum(map(len, weights))
    moved = sum(np.abs(own / len(index) - 1 / pairs).sum() for own in weights) / 2
    return [
        {
            "method": "draw of pages beside draw of pairs",
            "n": len(index),
            "pairs": pairs,
            "kept": pairs / 2 / index.unfiltered,  # ordered pairs, of unordered ones
            "other episodes": float(moved),
        }
    ]


def pair_weights(pairs: list[tuple[int, int]]) -> np.ndarray:
    """How likely each ordered pair of a page is: an image of it uniformly, then a partner."""
    firsts = np.array([first for first, _ in pairs])
    partners = {int(first): int((firsts == first).sum()) for first in set(firsts.tolist())}
    return np.array([1 / (len(partners) * partners[int(first)]) for first in firsts])
