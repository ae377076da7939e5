"""Tensors to pictures and back: grids, masks drawn over, heat maps, pairs. Plain PIL."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from guidekit.errors import GuidekitError
from guidekit.untrusted import open_picture

COLOURS = ("#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4", "#00a5a5", "#f032e6", "#808000")
# Black over purple and orange to pale yellow, even steps of lightness.
HEAT = ((0, 0, 4), (60, 15, 110), (140, 40, 110), (220, 80, 60), (250, 160, 20), (252, 255, 164))
SHOWN = 256  # least long side of pictures that are made to be looked at

TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow looks for an orientation.
ORIENTATIONS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")

# What Pillow raises for files that are damaged or claim to be huge. Its decoders pass on whatever
# they meet: struct.error, TypeError, RuntimeError and more, so there is no list to keep.
PICTURE_ERRORS = Exception


def read_picture(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A file as (3, H, W) in [-1, 1]: the largest middle part of that shape, at `size` (H, W).

    Raises GuidekitError for a file that is no picture.
    """
    try:
        with open_picture(path) as image:
            turned = upright(image).convert("RGB")
            fitted = ImageOps.fit(turned, size[::-1], Image.Resampling.BICUBIC)
    except FileNotFoundError:
        raise GuidekitError(f"picture {path}: no such file") from None
    except PICTURE_ERRORS as error:
        raise GuidekitError(f"picture {path}: not a readable picture ({error})") from None
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def upright(image: Image.Image) -> Image.Image:
    """A copy that is turned as its EXIF says, which it has no more; as it is if that is unreadable.

    Raises what Pillow raises for a damaged picture. ImageOps.exif_transpose writes the EXIF anew,
    which fails where any part of it is damaged.
    """
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except PICTURE_ERRORS:
        turn = None
    copy = image.copy() if turn is None else image.transpose(turn)
    copy.info = {k: v for k, v in copy.info.items() if k not in ORIENTATIONS}
    return copy


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W), or grey (1, H, W), in [0, 1] in 8 bits, rounded as diffusers does it."""
    if len(picture) == 1:
        return mask_image(picture[0].clamp(0, 1))
    values = picture.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray((values * 255).round().astype("uint8"))


def mask_image(mask: Tensor) -> Image.Image:
    """A mask (H, W) in [0, 1] as a grey picture of 8 bits."""
    return Image.fromarray((mask.detach().float().cpu().numpy() * 255).round().astype("uint8"))


def enlarge(image: Image.Image, least: int = SHOWN) -> Image.Image:
    """The picture with whole, crisp pixels so large that its long side reaches `least`."""
    factor = -(-least // max(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(images: list[Image.Image], columns: int = 4, gap: int = 4) -> Image.Image:
    """Pictures of one size in rows, on white."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def pair(before: Image.Image, after: Image.Image) -> Image.Image:
    """Two pictures side by side."""
    return grid([before, after], columns=2)


def overlay(image: Image.Image, masks: list[Tensor], tint: float = 0.18) -> Image.Image:
    """The enlarged picture with every mask (h, w) tinted and outlined in its own colour."""
    image = enlarge(image)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    for i, mask in enumerate(masks):
        inside = np.asarray(mask_image(mask).resize(image.size, Image.Resampling.BILINEAR)) >= 128
        weight = np.where(_edge(inside), 1.0, inside * tint)[..., None]
        pixels = pixels * (1 - weight) + weight * np.array(colour(i), dtype=np.float32)
    return Image.fromarray(pixels.round().astype("uint8"))


def colour(index: int) -> tuple[int, int, int]:
    """Red, green and blue of the segment with this index."""
    text = COLOURS[index % len(COLOURS)]
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def _edge(inside: np.ndarray) -> np.ndarray:
    """Pixels of a region (h, w) that touch its outside or the frame, two pixels wide."""
    core = np.pad(inside, 2)
    h, w = inside.shape
    for axis in (0, 1):
        core = core & np.roll(core, 1, axis) & np.roll(core, -1, axis)
        core = core & np.roll(core, 1, axis) & np.roll(core, -1, axis)
    return inside & ~core[2 : h + 2, 2 : w + 2]


def heat_map(values: Tensor, peak: float | None = None, least: int = SHOWN) -> Image.Image:
    """Values (h, w) of at least 0 from black to yellow, `peak` being the brightest, enlarged."""
    values = values.detach().float().cpu()
    peak = float(values.max()) if peak is None else peak
    scaled = torch.nan_to_num(values / max(peak, 1e-12)).clamp(0, 1).numpy() * (len(HEAT) - 1)
    stops = np.arange(len(HEAT))
    channels = [np.interp(scaled, stops, [c[i] for c in HEAT]) for i in range(3)]
    return enlarge(Image.fromarray(np.stack(channels, -1).round().astype("uint8")), least)


def heat_pair(before: Tensor, after: Tensor) -> Image.Image:
    """Two maps (h, w) side by side on one scale of colours."""
    peak = float(max(before.max(), after.max()))
    return pair(heat_map(before, peak), heat_map(after, peak))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when it is complete and is gone if not."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_picture(image: Image.Image, path: Path, settings: dict[str, Any] | None = None) -> None:
    """Writes a PNG, with the settings in its text chunk `guidekit`."""
    path.parent.mkdir(exist_ok=True)
    info = PngInfo()
    if settings is not None:
        info.add_itxt("guidekit", json.dumps(settings))
    with replacing(path) as part:
        image.save(part, format="PNG", pnginfo=info)


def sheet(pixels: Tensor, columns: int) -> Image.Image:
    """Pictures `(B, 3, H, W)` in [-1, 1] as one image."""
    sheet = make_grid((pixels.float().cpu().clamp(-1, 1) + 1) / 2, nrow=columns, padding=1)
    return Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy())
