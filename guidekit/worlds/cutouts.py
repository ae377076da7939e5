"""A folder of cut-outs, and the sprites that are made of them: turned, mirrored, scaled, shaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from guidekit.errors import GuidekitError

ENDINGS = (".webp", ".png", ".gif", ".tif", ".tiff")  # formats that have an alpha channel
SHADOW = 0.30  # share of the light that the middle of a shadow takes
_SHARE = np.float32(1 / 255)
FALL, SOFTNESS = 0.05, 0.04  # how far below the thing and how blurred, over its longer side


@dataclass(frozen=True)
class Sprite:
    """A cut-out as it is pasted: colours times cover, what shows behind, and its shadow."""

    colour: np.ndarray  # (h, w, 3) uint8, multiplied by the cover
    cover: np.ndarray  # (h, w, 1) uint8
    light: np.ndarray  # (h + 2m, w + 2m, 1) uint8, what the shadow leaves of the ground
    margin: int  # m, by which the shadow's box is larger on every side

    def mirrored(self) -> "Sprite":
        """The same with left and right exchanged."""
        return Sprite(self.colour[:, ::-1], self.cover[:, ::-1], self.light[:, ::-1], self.margin)

    def paste(self, image: np.ndarray, x: float, y: float) -> tuple[slice, slice, np.ndarray]:
        """Composes the sprite onto image `(H, W, 3)` float32, its middle at x, y in pixels.

        Returns the rows and columns that it lies in and where in them it covers half a pixel.
        """
        height, width, _ = self.colour.shape
        top, left = round(y - height / 2), round(x - width / 2)
        rows, columns, own = _window(image, top - self.margin, left - self.margin, self.light)
        image[rows, columns] *= self.light[own] * _SHARE
        rows, columns, own = _window(image, top, left, self.colour)
        patch, cover = image[rows, columns], self.cover[own]
        patch *= 1 - cover * _SHARE
        patch += self.colour[own]
        return rows, columns, cover[..., 0] >= 128


def _window(image: np.ndarray, top: int, left: int, part: np.ndarray):
    """Rows and columns of the image that the part covers, and which of its own those are."""
    rows = slice(max(top, 0), min(top + part.shape[0], image.shape[0]))
    columns = slice(max(left, 0), min(left + part.shape[1], image.shape[1]))
    own_rows = slice(rows.start - top, rows.stop - top)
    return rows, columns, (own_rows, slice(columns.start - left, columns.stop - left))


class Cutouts:
    """The named images of a folder; every sprite is made when first asked for and kept."""

    def __init__(self, folder: Path, things: Mapping[str, str]):
        """things: file names without ending to words. Raises GuidekitError for one that lacks."""
        self.files = {words: _file(folder, name) for name, words in things.items()}
        self.kinds = tuple(self.files)
        self._turned: dict[tuple[str, int], Image.Image] = {}
        self._sprites: dict[tuple[str, int, int], Sprite] = {}

    def sprite(self, kind: str, angle: int, pixels: int) -> Sprite:
        """The cut-out turned by degrees, its longer side so many pixels long."""
        key = (kind, angle, pixels)
        if key not in self._sprites:
            self._sprites[key] = _sprite(self._turn(kind, angle), pixels)
        return self._sprites[key]

    def _turn(self, kind: str, angle: int) -> Image.Image:
        """The cut-out turned, without empty borders; kept, as all sizes are made of it."""
        if (kind, angle) not in self._turned:
            image = Image.open(self.files[kind]).convert("RGBA")
            turned = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
            box = turned.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
            if box is None:
                raise GuidekitError(f"{self.files[kind]} is transparent all over; leave it out")
            self._turned[kind, angle] = turned.crop(box)
        return self._turned[kind, angle]


def _file(folder: Path, name: str) -> Path:
    """The image of that name in the folder."""
    if Path(name).name != name:
        raise GuidekitError(f"{name!r} is not a file's name; cut-outs lie in one folder")
    found = [folder / (name + ending) for ending in ENDINGS if (folder / (name + ending)).exists()]
    if not found:
        raise GuidekitError(
            f"{folder} holds no cut-out {name} ({', '.join(ENDINGS)}); it has {_some(folder)}. "
            "The built-in ones: npm pack @lobehub/fluent-emoji-3d && tar xf lobehub-*.tgz, "
            "then the folder is package/assets"
        )
    return found[0]


def _some(folder: Path) -> str:
    """A few names of what the folder holds."""
    if not folder.is_dir():
        return "nothing: there is no such folder"
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _sprite(turned: Image.Image, pixels: int) -> Sprite:
    """Scales a cut-out and lets it throw a shadow."""
    scale = pixels / max(turned.size)
    side = [max(round(length * scale), 1) for length in turned.size]
    image = turned.resize(side, Image.Resampling.LANCZOS, reducing_gap=3.0)
    values = np.asarray(image)
    colour = np.rint(values[..., :3] * (values[..., 3:] * _SHARE)).astype(np.uint8)
    margin = round(3 * SOFTNESS * pixels) + 1
    light = 255 - SHADOW * _shadow(image.getchannel("A"), margin, pixels)
    return Sprite(colour, values[..., 3:], np.rint(light).astype(np.uint8)[..., None], margin)


def _shadow(alpha: Image.Image, margin: int, pixels: int) -> np.ndarray:
    """The cover 0..255, blurred and lowered, in a box that is larger by the margin."""
    box = Image.new("L", (alpha.width + 2 * margin, alpha.height + 2 * margin))
    box.paste(alpha, (margin, margin + round(FALL * pixels)))
    soft = box.filter(ImageFilter.GaussianBlur(SOFTNESS * pixels))
    return np.asarray(soft, np.float32)
