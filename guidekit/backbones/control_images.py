"""What a control sees of an image or a label map."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from guidekit.conditions import ALIKE
from guidekit.errors import GuidekitError
from guidekit.images import as_rgb
from guidekit.labels import LabelMap

FEW = 256  # colours of an image that is a map, not a photograph


def control_pixels(image: Any, channels: int, size: tuple[int, int]) -> Tensor:
    """What a control of so many channels sees of an image, (C, H, W) in [0, 1].

    A LabelMap is shown in its palette's colours, or one-hot to a control with a channel for each
    class. Raises GuidekitError for an image that would be stretched, and for a control of classes
    without a map of them.
    """
    if isinstance(image, LabelMap):
        check_shape(image.ids.shape[1], image.ids.shape[0], size)
        image = image.resized(*size)
        if channels == len(image.labels) and channels != 3:
            return image.one_hot()
        if channels not in (1, 3):
            raise GuidekitError(
                f"this control reads {channels} channels, one for a class, and label set "
                f"{image.labels.name!r} has {len(image.labels)} classes; give it a map of its own "
                "classes (--labels), or an affinity to them (guidekit affinity)"
            )
        image = image.coloured()
    if not isinstance(image, Image.Image):
        raise GuidekitError(
            f"a control's image is an image, its path or a LabelMap, not {type(image).__name__}"
        )
    if channels not in (1, 3):
        raise GuidekitError(
            f"this control reads {channels} channels, one for a class; give it a label map of so "
            "many classes (--map, --labels)"
        )
    image = _at_size(as_rgb(image), size).convert("L" if channels == 1 else "RGB")
    values = np.atleast_3d(np.array(image)).astype(np.float32) / 255.0
    return torch.from_numpy(values.transpose(2, 0, 1))


def _at_size(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image at `size` (H, W): one in few colours by nearest neighbour, others as diffusers.

    Greys are never colours: edges have two of them as well.
    """
    if image.size == size[::-1]:
        return image
    check_shape(*image.size, size)
    found = image.getcolors(FEW)
    is_map = found is not None and any(len(set(colour)) > 1 for _, colour in found)
    way = Image.Resampling.NEAREST if is_map else Image.Resampling.LANCZOS
    return image.resize(size[::-1], way)


def check_shape(
    width: int,
    height: int,
    size: tuple[int, int],
    what: str = "a control's image",
    remedy: str = "crop it to that shape, or give --height and --width",
) -> None:
    """Raises GuidekitError for an image that would be stretched to `size` (H, W)."""
    if abs(width * size[0] / (height * size[1]) - 1) > ALIKE:
        raise GuidekitError(
            f"{what} is {width}x{height}, of another shape than {size[1]}x{size[0]}; {remedy}"
        )
