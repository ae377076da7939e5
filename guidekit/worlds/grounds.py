"""The grounds that things stand on: plain and graded colours, sky, grass, sand, night.

Their forms are soft: what an autoencoder of 8 pixels to a latent cannot keep teaches it nothing.
"""

from collections.abc import Callable

import numpy as np

# How captions speak of each; the first is the usual one.
GROUNDS = {
    "white": ("on a white background", "on white", "in front of a white wall"),
    "blue": ("on a blue background", "on blue", "in front of a blue wall"),
    "pink": ("on a pink background", "on pink", "in front of a pink wall"),
    "yellow": ("on a yellow background", "on yellow", "in front of a yellow wall"),
    "purple": ("on a purple background", "on purple", "in front of a purple wall"),
    "sunset": ("at sunset", "in the evening", "in front of a sunset"),
    "sky": ("in the sky", "in the clouds", "in front of clouds"),
    "grass": ("on grass", "on a meadow", "on the grass"),
    "sand": ("on sand", "on a beach", "on the sand"),
    "night": ("at night", "under the stars", "in the dark"),
}
PLAIN = {
    "white": (236, 236, 238),
    "blue": (112, 164, 236),
    "pink": (244, 172, 200),
    "yellow": (246, 214, 108),
    "purple": (150, 112, 196),
}
VARIANTS = 24  # drawn once of every ground that is not plain


class Grounds:
    """Grounds of any size, each variant drawn once and kept."""

    def __init__(self):
        self._kept: dict[tuple[str, int, int], np.ndarray] = {}

    def draw(self, name: str, size: int, rng: np.random.Generator) -> np.ndarray:
        """A ground `(size, size, 3)` float32 in about 0..255, in one of many tints."""
        variant = 0 if name in PLAIN else int(rng.integers(VARIANTS))
        key = (name, size, variant)
        if key not in self._kept:
            own = np.random.Generator(np.random.Philox(key=[variant, 1 << 33]))
            self._kept[key] = _DRAW[name](size, own).astype(np.float32)
        return self._kept[key] + rng.normal(0, 5, 3).astype(np.float32)


def _graded(size: int, top: tuple, bottom: tuple) -> np.ndarray:
    """One colour above that becomes another below: `(size, size, 3)`."""
    share = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    rows = np.array(top, np.float32) * (1 - share) + np.array(bottom, np.float32) * share
    return np.repeat(rows, size, axis=1)


def _plain(colour: tuple) -> Callable[[int, np.random.Generator], np.ndarray]:
    """A colour that is a little lighter above."""
    lighter = tuple(value + 8 for value in colour)
    darker = tuple(value - 8 for value in colour)
    return lambda size, rng: _graded(size, lighter, darker)


def _blobs(size: int, rng: np.random.Generator, count: int, width: tuple, rows: tuple):
    """Soft spots, wider than high, at random places of the rows: cover `(size, size, 1)` 0..1."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    cover = np.zeros((size, size), np.float32)
    for _ in range(count):
        cx, cy, w = rng.uniform(0, 1), rng.uniform(*rows), rng.uniform(*width)
        cover = np.maximum(cover, np.exp(-(((x - cx) / w) ** 2) - ((y - cy) / (0.4 * w)) ** 2))
    return cover[..., None]


def _sky(size: int, rng: np.random.Generator) -> np.ndarray:
    sky = _graded(size, (84, 156, 236), (188, 222, 250))
    return sky + _blobs(size, rng, 4, (0.12, 0.3), (0.1, 0.9)) * (252 - sky) * 0.8


def _sunset(size: int, rng: np.random.Generator) -> np.ndarray:
    sky = _graded(size, (116, 84, 156), (252, 164, 100))
    return sky + _blobs(size, rng, 1, (0.5, 0.8), (0.8, 1.0)) * np.array([8, 40, 10]) * 0.8


def _land(size: int, rng: np.random.Generator, sky: np.ndarray, land: np.ndarray) -> np.ndarray:
    """Land below a sky, parted by a hill's soft line in the upper half."""
    x = np.arange(size, dtype=np.float32) / size
    line = rng.uniform(0.28, 0.46) + rng.uniform(0.01, 0.05) * np.sin(
        rng.uniform(2, 5) * x + rng.uniform(0, 6.28)
    )
    y = np.arange(size, dtype=np.float32)[:, None] / size
    cover = np.clip((y - line) * size / 2 + 0.5, 0, 1)[..., None]
    return sky + cover * (land - sky)


def _grass(size: int, rng: np.random.Generator) -> np.ndarray:
    land = _graded(size, (148, 208, 92), (84, 160, 60))
    land += (_blobs(size, rng, 8, (0.1, 0.3), (0.3, 1.0)) - 0.4) * 18
    return _land(size, rng, _graded(size, (150, 204, 248), (214, 236, 252)), land)


def _sand(size: int, rng: np.random.Generator) -> np.ndarray:
    land = _graded(size, (246, 222, 170), (226, 190, 128))
    land += (_blobs(size, rng, 8, (0.1, 0.3), (0.3, 1.0)) - 0.4) * 14
    return _land(size, rng, _graded(size, (126, 206, 226), (96, 178, 214)), land)


def _night(size: int, rng: np.random.Generator) -> np.ndarray:
    sky = _graded(size, (20, 24, 60), (56, 56, 112))
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    for _ in range(14):
        cx, cy, w = *rng.uniform(0, 1, 2), rng.uniform(0.006, 0.011)
        star = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * w**2))
        sky += star[..., None] * np.array([180, 180, 140], np.float32)
    return sky


_DRAW = {name: _plain(colour) for name, colour in PLAIN.items()} | {
    "sunset": _sunset,
    "sky": _sky,
    "grass": _grass,
    "sand": _sand,
    "night": _night,
}
