"""Masks: from files, arrays, images and boxes; at the grid of a map.

What a file means, the first that holds:

1. Opacity, where it goes from clear to opaque: transparent is off. An opacity that is the same
   everywhere, or nowhere below 250 of 255, counts for nothing.
2. Colours on black without white, palettes by the colours that they show: black is off, every
   colour is on.
3. Greys: black is off, white (255, or 65535 in 16 bits) is on, between is soft. Where there is
   nothing but 0 and 1 these are off and on.

What could mean two things is refused, and the message says what was seen.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.images import is_deep, load_image, shares, upright

OPAQUE = 250  # of 255: as good as opaque, as lossy formats have it
GREY = 16  # most that red, green and blue of a grey differ by
BLACK = 24  # of 255: as good as black beside a colour
GROUND = 0.05  # share of a coloured mask from which black, or white, is its ground
DARK = 1 / 8  # of white: greys that stay below are numbers of something, not shares of on
COMMON = 16  # colours that make up nine tenths of what is no photograph

Box = tuple[float, float, float, float]  # left, top, right, bottom in fractions of the image


def as_mask(value: object) -> tuple[Tensor, Box | None]:
    """Mask `(H, W)` of whatever a user gives for one, and the box that it came from, if any.

    value: a tensor or an array (H, W), an image or an array of one (H, W, 3 or 4), the path of one,
    or a box (left, top, right, bottom) in fractions. Whole numbers mean what they mean in a file;
    fractions are taken as they are. Raises GuidekitError for anything else.
    """
    if isinstance(value, Tensor):
        return _tensor_mask(value), None
    if isinstance(value, np.ndarray):
        return _array_mask(value), None
    if isinstance(value, Image.Image):
        return image_mask(upright(value)), None
    if isinstance(value, str | Path):
        return load_mask(value), None
    if isinstance(value, tuple | list) and len(value) == 4:
        left, top, right, bottom = map(float, value)
        box = left, top, right, bottom
        return box_mask(box), box
    raise GuidekitError(
        f"a mask is a tensor or array (H, W), an image, the path of one, or a box (left, top, "
        f"right, bottom), not {type(value).__name__}"
    )


def _tensor_mask(value: Tensor) -> Tensor:
    """A tensor with fractions as it is; another as the array that it is."""
    if value.is_floating_point():
        return value
    return _array_mask(value.detach().cpu().numpy())


def _array_mask(values: np.ndarray) -> Tensor:
    if values.dtype == np.uint8 and values.ndim == 3 and values.shape[-1] in (2, 3, 4):
        return image_mask(Image.fromarray(values))
    if values.dtype.kind in "biu" and values.size:
        return torch.from_numpy(_grey_mask(values))
    if values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float32))
    raise GuidekitError(f"a mask holds numbers, not {values.dtype} of shape {values.shape}")


def load_mask(path: str | Path) -> Tensor:
    """Mask `(H, W)` in [0, 1] of an image file; the module says what it means.

    Raises GuidekitError for a file that is no image or could mean two things.
    """
    return load_image(path, "mask", image_mask)


def image_mask(image: Image.Image) -> Tensor:
    """Mask `(H, W)` in [0, 1] of an image; the module says what it means.

    Raises GuidekitError for one that could mean two things.
    """
    if is_deep(image):
        values = np.asarray(image)
        if (clear := image.info.get("transparency")) is not None:
            return torch.from_numpy((values != clear).astype(np.float32))
        return torch.from_numpy(_grey_mask(values))
    image = image.convert("RGBA")
    colours, opacity = np.asarray(image)[..., :3], np.asarray(image)[..., 3]
    if _counts(opacity):
        _check_opacity(colours, opacity)
        return torch.from_numpy(opacity / np.float32(255))
    if _is_grey(colours):
        return torch.from_numpy(_grey_mask(np.asarray(image.convert("L"))))
    return torch.from_numpy(_coloured_mask(colours))


def _is_grey(colours: np.ndarray) -> bool:
    """Whether (nearly) nothing that is seen on black is in colour."""
    high, low = _ends(colours)
    return bool((high - low > GREY).sum() <= 0.02 * (high > BLACK).sum())


def _ends(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Highest and lowest channel of colours (..., 3); numpy's own takes ten times as long."""
    red, green, blue = (colours[..., i] for i in range(3))
    high, low = np.maximum(red, green), np.minimum(red, green)
    return np.maximum(high, blue), np.minimum(low, blue)


def _counts(opacity: np.ndarray) -> bool:
    """Whether an opacity (H, W) of 255 says anything."""
    low, high = opacity.min(), opacity.max()
    return bool(high == 0 or low < min(high, OPAQUE))


def _check_opacity(colours: np.ndarray, opacity: np.ndarray) -> None:
    """Raises GuidekitError for an opacity beside which something else could be meant."""
    if (least := opacity.min()) >= 128:
        raise GuidekitError(
            f"nothing of it is transparent (opacity from {least} to {opacity.max()} of 255); save "
            "it without transparency, or with what is off transparent"
        )
    if not (seen := colours[opacity >= 128]).size:
        return
    high, low = _ends(seen)
    black, white = (high <= BLACK).mean(), (low >= 255 - BLACK).mean()
    if min(black, white) > 0.01 and black + white > 0.98:
        covered, on = (opacity >= 128).mean(), white * (opacity >= 128).mean()
        raise GuidekitError(
            f"its opacity covers {covered:.1%} of it and its white {on:.1%}, and either could be "
            "meant; save it without transparency, or in one colour"
        )


def _grey_mask(values: np.ndarray) -> np.ndarray:
    """Greys as shares of on. Raises GuidekitError for those that are too dark for it."""
    high = values.max()
    if values.dtype.kind in "biu" and values.min() >= 0 and high <= 1:
        return values.astype(np.float32)
    found = shares(values)
    if 0 < found.max() < DARK:
        raise GuidekitError(
            f"it holds {_common(values)}, and {high} is nearly black; save what is on as white, or "
            "of a map of classes use a layout's `map` and `value`"
        )
    return found


def _coloured_mask(colours: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) on black as on and off. Raises GuidekitError where black is not the ground.

    Nor may white be there, which is a ground too, nor so many colours as in a photograph.
    """
    high, low = _ends(colours)
    off, white = high <= BLACK, low >= 255 - BLACK
    red, green, blue = np.moveaxis(colours >> 4, -1, 0).astype(np.uint16)
    cells = (red << 8) + (green << 4) + blue
    kinds = np.sort(np.bincount(cells.ravel()))
    grounded = off.mean() >= GROUND and white.mean() < GROUND
    if not grounded or kinds[-COMMON:].sum() < 0.9 * cells.size:
        raise GuidekitError(
            f"it is in colour, {off.mean():.1%} black and else {_common_colours(colours)}; a "
            "coloured mask is on black, which is off, without white; or use a layout's `map` and "
            "`value`"
        )
    return np.asarray(~off, np.float32)


def _common(values: np.ndarray) -> str:
    """The commonest values of an array, with their shares."""
    found, counts = np.unique(values, return_counts=True)
    if len(found) > 8:
        return f"values from {found[0]} to {found[-1]}"
    each = (f"{v} ({n / values.size:.1%})" for v, n in zip(found, counts, strict=True))
    return ", ".join(each)


def _common_colours(colours: np.ndarray) -> str:
    flat = colours[_ends(colours)[0] > BLACK]
    found, counts = np.unique(flat & 0xF0, axis=0, return_counts=True)
    share = flat.shape[0] / (colours.size // 3)
    order = np.argsort(-counts)[:4]
    each = (f"about #{bytes(found[i]).hex()} ({share * counts[i] / len(flat):.1%})" for i in order)
    return ", ".join(each)


def class_values(image: Image.Image) -> np.ndarray | None:
    """Whole numbers (H, W) of an image that holds classes: a palette's indices, or greys.

    None for one in colour, with transparency or in fractions. Greys saved as colours count.
    """
    if image.mode in ("P", "L", "1", "I") or image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.int64)
    bands = np.asarray(image)
    if image.mode in ("LA", "PA", "RGBA"):
        if bands[..., -1].min() < 255:
            return None
        bands = bands[..., :-1]
    if image.mode in ("LA", "PA", "RGBA", "RGB") and (bands == bands[..., :1]).all():
        return bands[..., 0].astype(np.int64)
    return None


def size_of(mask: Tensor) -> tuple[int, int]:
    """Width and height of a mask `(H, W)`."""
    return mask.shape[-1], mask.shape[-2]


def coverage(mask: Tensor) -> float:
    """Share of the image that a mask `(H, W)` covers, from 0 to 1."""
    return float(mask.double().mean())


def box_mask(box: Box, size: int = 256) -> Tensor:
    """Mask `(size, size)` of the box left, top, right, bottom in fractions of the image.

    Pixels that the box cuts get the share that it covers. Raises GuidekitError for a box that is
    inverted, empty or outside the image.
    """
    left, top, right, bottom = box
    if not all(np.isfinite(box)) or not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise GuidekitError(
            f"box {','.join(f'{b:g}' for b in box)}: give left,top,right,bottom as fractions with "
            "0 <= left < right <= 1 and 0 <= top < bottom <= 1"
        )
    edges = torch.arange(size + 1, dtype=torch.float64) / size

    def cover(low: float, high: float) -> Tensor:
        return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * size

    return (cover(top, bottom)[:, None] * cover(left, right)[None]).float()


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Mask `(H, W)` to `(height, width)`: the mean over each target pixel (soft targets, R8)."""
    return F.interpolate(mask[None, None].float(), (height, width), mode="area")[0, 0]
