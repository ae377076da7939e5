"""Images as people have them, read in one way; tensors to images; grids, overlays, heat maps.

Every image that is looked at is 8 bits of red, green and blue, upright, its transparency on white.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from guidekit.errors import GuidekitError
from guidekit.system.untrusted import open_image

COLOURS = ("#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4", "#00a5a5", "#f032e6", "#808000")
# Black over purple and orange to pale yellow, even steps of lightness.
HEAT = ((0, 0, 4), (60, 15, 110), (140, 40, 110), (220, 80, 60), (250, 160, 20), (252, 255, 164))
SHOWN = 256  # least long side of images that are made to be looked at

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
IMAGE_ERRORS = Exception

ROUNDED = 1.001  # fractions that were computed pass their white by so much at most
Fit = Literal["crop", "pad", "crops"]
PLACES = {"crop": (0.5,), "crops": (0.0, 0.5, 1.0)}  # of the parts, along the side that is too long
T = TypeVar("T")


# Reading


def load_image(
    path: str | Path, what: str = "image", meaning: Callable[[Image.Image], T] | None = None
) -> T:
    """What a file shows: its first frame, upright, by default as `as_rgb`.

    what: what the file is to the user, with which messages begin. meaning: makes something else of
    the upright image in its own mode. Raises GuidekitError for a file that is not there, that is no
    image or whose numbers have no such meaning.
    """
    try:
        with open_image(path) as image:
            shown = upright(image)
    except FileNotFoundError:
        raise GuidekitError(f"{what} {path}: no such file") from None
    except IMAGE_ERRORS as error:
        raise GuidekitError(f"{what} {path}: not a readable image ({error})") from None
    try:
        return (meaning or as_rgb)(shown)
    except ValueError as error:  # Pillow's, for modes that it cannot convert
        raise GuidekitError(f"{what} {path}: {error}") from None


def read_image(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A file as (3, H, W) in [-1, 1]: the largest middle part of that shape, at `size` (H, W).

    Raises GuidekitError as `load_image`.
    """
    return to_uint8(fitted(load_image(path), size)[0]).float() / 127.5 - 1


def upright(image: Image.Image) -> Image.Image:
    """A copy that is turned as its EXIF says, which it has no more; as it is if that is unreadable.

    Raises what Pillow raises for a damaged image, and GuidekitError for one without area.
    ImageOps.exif_transpose writes the EXIF anew, which fails where any part of it is damaged.
    """
    image.load()
    if min(image.size) < 1:
        raise GuidekitError("it has no pixels")
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except IMAGE_ERRORS:
        turn = None
    copy = image.copy() if turn is None else image.transpose(turn)
    copy.info = {k: v for k, v in copy.info.items() if k not in ORIENTATIONS}
    copy.format = image.format
    return copy


def as_rgb(image: Image.Image) -> Image.Image:
    """An image in 8 bits of red, green and blue.

    Transparency, also of palettes and of one colour, is composited on white. Greys of 16 and 32
    bits and fractions become `shares` of white. CMYK is turned by its formula, 255 - ink, and
    colour profiles are not read. Raises ValueError for what has no such meaning.
    """
    if is_deep(image):
        shown = shares(np.asarray(image))
        if (clear := image.info.get("transparency")) is not None:
            shown = np.where(np.asarray(image) == clear, 1, shown)
        return Image.fromarray((shown * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        backing = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(backing, image.convert("RGBA"))
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether it is grey in 16 or 32 bits or in fractions, all of which Pillow cuts at 255."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def shares(values: np.ndarray) -> np.ndarray:
    """Greys as shares of white, float32 in [0, 1].

    White is 255 in 8 bits and 65535 in 16. Of wider integers it is 255 if none is larger, else
    65535; of fractions 1, or 255 if some are larger than 2. Raises GuidekitError that says the
    range for other numbers.
    """
    low, high = float(values.min()), float(values.max())
    white = _white(values.dtype, high)
    if not (low >= 0 and high <= white * ROUNDED):  # NaN is neither
        raise GuidekitError(
            f"its values reach from {low:g} to {high:g}; save it in 8 or 16 bits, or in fractions "
            "from 0 to 1"
        )
    return np.minimum(values / white, 1).astype(np.float32)


def _white(dtype: np.dtype, high: float) -> float:
    if dtype.kind == "b":
        return 1
    if dtype.kind == "f":
        return 255 if high >= 2 else 1
    if dtype.kind == "u" and dtype.itemsize <= 2:
        return 255 if dtype.itemsize == 1 else 65535
    return 255 if high <= 255 else 65535


def middle(
    given: tuple[int, int], wanted: tuple[int, int], place: float = 0.5
) -> tuple[float, float, float, float]:
    """The box left, top, right, bottom of the largest part of an image that has another's shape.

    given: (W, H) of the image. wanted: (H, W). place: 0 is the start of the side that is too long,
    1 its end.
    """
    scale = min(given[0] / wanted[1], given[1] / wanted[0])
    parts = [min(side * scale, whole) for side, whole in zip(wanted[::-1], given, strict=True)]
    starts = [(whole - part) * place for whole, part in zip(given, parts, strict=True)]
    if all(part == int(part) for part in parts):  # whole pixels stay whole
        starts = [int(start) for start in starts]
    return *starts, starts[0] + parts[0], starts[1] + parts[1]


def fitted(image: Image.Image, size: tuple[int, int], fit: Fit = "crop") -> list[Image.Image]:
    """An image in RGB at `size` (H, W), once or, of "crops", three times.

    crop: the largest middle part of that shape. pad: the whole, in the middle of white. crops: such
    parts at the start, the middle and the end of the side that is too long; they overlap or, of
    images more than three times too long, leave something out.
    """
    shape = size[::-1]
    if fit == "pad":
        return [ImageOps.pad(image, shape, Image.Resampling.LANCZOS, color="white")]
    boxes = [middle(image.size, size, place) for place in PLACES[fit]]
    filter = Image.Resampling.LANCZOS
    return [image.resize(shape, filter, box, reducing_gap=3.0) for box in boxes]


def numbered(name: str) -> list[tuple[int, str]]:
    """A key that sorts names with their numbers as numbers: 2.png before 10.png."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts] + [(-1, name)]


def to_uint8(image: Image.Image) -> Tensor:
    """An image in RGB as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# Writing and showing


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W), or grey (1, H, W), in [0, 1] in 8 bits, rounded as diffusers does it."""
    if len(pixels) == 1:
        return mask_image(pixels[0].clamp(0, 1))
    values = pixels.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray((values * 255).round().astype("uint8"))


def mask_image(mask: Tensor) -> Image.Image:
    """A mask (H, W) in [0, 1] as a grey image of 8 bits."""
    return Image.fromarray((mask.detach().float().cpu().numpy() * 255).round().astype("uint8"))


def enlarge(image: Image.Image, least: int = SHOWN) -> Image.Image:
    """The image with whole, crisp pixels so large that its long side reaches `least`."""
    factor = -(-least // max(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(images: list[Image.Image], columns: int = 4, gap: int = 4) -> Image.Image:
    """Images of one size in rows, on white."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def pair(before: Image.Image, after: Image.Image) -> Image.Image:
    """Two images side by side."""
    return grid([before, after], columns=2)


def overlay(image: Image.Image, masks: list[Tensor], tint: float = 0.18) -> Image.Image:
    """The enlarged image with every mask (h, w) tinted and outlined in its own colour."""
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


def save_image(image: Image.Image, path: Path, settings: dict[str, Any] | None = None) -> None:
    """Writes a PNG, with the settings in its text chunk `guidekit`."""
    path.parent.mkdir(exist_ok=True)
    info = PngInfo()
    if settings is not None:
        info.add_itxt("guidekit", json.dumps(settings))
    with replacing(path) as part:
        image.save(part, format="PNG", pnginfo=info)


def sheet(pixels: Tensor, columns: int) -> Image.Image:
    """Images `(B, 3, H, W)` in [-1, 1] as one image."""
    sheet = make_grid((pixels.float().cpu().clamp(-1, 1) + 1) / 2, nrow=columns, padding=1)
    return Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy())
