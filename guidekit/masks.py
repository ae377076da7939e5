"""Masks: from files, arrays, images and boxes; at the grid of a map."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.images import PICTURE_ERRORS
from guidekit.untrusted import open_picture

Box = tuple[float, float, float, float]  # left, top, right, bottom in fractions of the image


def as_mask(value: object) -> tuple[Tensor, Box | None]:
    """Mask `(H, W)` of whatever a user gives for one, and the box that it came from, if any.

    value: a tensor or an array (H, W), an image, the path of one, or a box (left, top, right,
    bottom) in fractions. Raises GuidekitError for anything else.
    """
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.bool else value, None
    if isinstance(value, np.ndarray):
        return as_mask(torch.from_numpy(value))
    if isinstance(value, Image.Image):
        return image_mask(value), None
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


def image_mask(image: Image.Image) -> Tensor:
    """Mask `(H, W)` in [0, 1] of a grey image; of one with transparency, its opacity."""
    image.load()
    channel = image.getchannel("A") if "A" in image.getbands() else image.convert("L")
    return torch.from_numpy(np.array(channel)).float() / 255


def load_mask(path: str | Path) -> Tensor:
    """Mask `(H, W)` in [0, 1] of an image file; see `image_mask`."""
    try:
        with open_picture(path) as image:
            return image_mask(image)
    except FileNotFoundError:
        raise GuidekitError(f"mask {path}: no such file") from None
    except PICTURE_ERRORS as error:
        raise GuidekitError(f"mask {path}: not a readable picture ({error})") from None


def box_mask(box: Box, size: int = 256) -> Tensor:
    """Mask `(size, size)` of the box left, top, right, bottom in fractions of the picture.

    Pixels that the box cuts get the share that it covers. Raises GuidekitError for a box that is
    inverted, empty or outside the picture.
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
