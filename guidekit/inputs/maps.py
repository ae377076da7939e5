"""Maps of a layout: one image whose numbers or colours say where each segment is."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.images import as_rgb, is_deep, load_image
from guidekit.masks import class_values

NEAR = 48  # most that a colour of a JPEG differs from the one that was saved
COMMON = 0.01  # share of an image that makes a colour one of its own
MANY = 3 * 10**6  # numbers of an image that are enough to know its colours
LISTED = 20  # values or colours in a message


@dataclass(frozen=True, eq=False)
class Map:
    """Numbers (H, W) and colours (H, W, 3) of an image, as far as it has them.

    own: where the file has lost its exact colours, those that it is made of, else None.
    """

    numbers: np.ndarray | None
    colours: np.ndarray | None
    own: np.ndarray | None = None

    def mask(self, value: object) -> Tensor:
        """Mask `(H, W)` of the pixels of a number, or of a colour such as #ff0000.

        Raises GuidekitError, with what exists, for a value that no pixel has.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            found = self._of_number(value)
        else:
            found = self._of_colour(value)
        if not found.any():
            raise GuidekitError(f"no pixel of the map is {value}; it holds {self._listed(value)}")
        return torch.from_numpy(found).float()

    def _of_number(self, value: int) -> np.ndarray:
        if self.own is not None:
            raise GuidekitError("a JPEG keeps no numbers; save the map as PNG, or give colours")
        if self.numbers is None:
            raise GuidekitError("the map is in colour, so `value` must be a colour such as #ff0000")
        return self.numbers == value

    def _of_colour(self, value: object) -> np.ndarray:
        try:
            colour = np.array(ImageColor.getrgb(value)[:3])
        except (ValueError, AttributeError, TypeError):
            raise GuidekitError(
                "`value` must be a colour such as #ff0000"
                + ("" if self.numbers is None else ", or a whole number of the map")
            ) from None
        if self.colours is None:
            raise GuidekitError("the map has 16 bits or more, so `value` must be a whole number")
        if self.own is None:
            return _distance(self.colours, colour) == 0
        near = _distance(self.colours, colour)
        if near.min() > NEAR:
            return np.zeros(near.shape, bool)
        found = np.ones(near.shape, bool)
        for other in (o for o in self.own if _distance(o, colour) > 0):
            found &= near < _distance(self.colours, other)
        return found

    def _listed(self, value: object) -> str:
        """What it holds, as a message says it."""
        if isinstance(value, int):
            found = np.unique(self.numbers)
            more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
            return ", ".join(map(str, found[:LISTED])) + more
        exact = self.own is None
        own = _commonest(self.colours, *((0xFF,) if exact else (0xE0, COMMON)))
        return ", ".join("#" + bytes(c.astype(np.uint8)).hex() for c in own[:LISTED])


def load_map(path: str | Path, named: list[tuple[int, ...]]) -> Map:
    """The map in a file. named: the colours that will be asked for.

    Raises GuidekitError for a file that is no image.
    """
    return load_image(path, "layout map", lambda image: as_map(image, named))


def as_map(image: Image.Image, named: list[tuple[int, ...]]) -> Map:
    """The map that an image is; see `load_map`."""
    numbers = class_values(image)
    colours = None if is_deep(image) else np.asarray(as_rgb(image))
    if image.format not in ("JPEG", "MPO"):
        return Map(numbers, colours)
    own = [np.array(colour) for colour in dict.fromkeys(named)]
    for colour in _commonest(colours, 0xE0, COMMON):
        if all(_distance(colour, other) > NEAR for other in own):
            own.append(colour)
    return Map(numbers, colours, np.array(own))


def _commonest(colours: np.ndarray, bits: int, share: float = 0.0) -> np.ndarray:
    """Means (N, 3) of the pixels that agree in these bits, the commonest first.

    Of large images every so manieth row and column counts.
    """
    step = max(1, int((colours.size / MANY) ** 0.5))
    flat = colours[::step, ::step].reshape(-1, 3)
    red, green, blue = (flat & bits).T.astype(np.int32)
    cells = (red << 16) + (green << 8) + blue
    _, place, counts = np.unique(cells, return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(place, flat[:, i]) for i in range(3)], -1) / counts[:, None]
    order = np.argsort(-counts, kind="stable")
    return means[order][counts[order] >= share * len(flat)]


def _distance(colours: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Largest difference of a channel, (...) of colours (..., 3)."""
    found = np.zeros(colours.shape[:-1], np.int16)
    for channel, value in enumerate(colour):
        off = np.abs(colours[..., channel].astype(np.int16) - np.int16(value))
        np.maximum(found, off, out=found)
    return found
