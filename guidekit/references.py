"""Reference pictures: what a user shows in place of, or beside, words."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.images import PICTURE_ERRORS, read_picture, to_image, upright
from guidekit.untrusted import file_name, open_picture
from guidekit.worlds import scenes

BUILT_IN = re.compile(r"scene-(\d+)")
SCENE_SIZE = 64  # of built-in references
LARGEST = 1024  # longer side of a folder's references
ENOUGH = 518  # shorter side of the same; encoders see the middle square at 224 to 518
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture to follow, and the path that it came from; two are equal if they are one object."""

    picture: Image.Image
    path: str = ""

    def pixels(self, size: int) -> Tensor:
        """Its largest centred square, (3, size, size) in [-1, 1]."""
        return to_pixels(square(self.picture, size))


def as_reference(value: object) -> Reference:
    """A reference of whatever a user gives for one: itself, an image, the path of one.

    Raises GuidekitError for anything else.
    """
    if isinstance(value, Reference):
        return value
    if isinstance(value, Image.Image):
        return Reference(upright(value))
    if isinstance(value, str | Path):
        return load_reference(value)
    raise GuidekitError(
        f"a reference is an image, the path of one, or guidekit.Reference, not "
        f"{type(value).__name__}"
    )


def load_reference(path: str | Path) -> Reference:
    """A reference from a picture file; ValueError that says what is wrong with it.

    A name such as scene-3, where there is no such file, is that scene of the held-out split.
    """
    path = Path(path)
    if (built_in := BUILT_IN.fullmatch(path.name)) and not path.exists():
        return Reference(to_image((_scene(int(built_in[1]), SCENE_SIZE) + 1) / 2), path.name)
    try:
        with open_picture(path) as image:
            return Reference(upright(image), str(Path(path).resolve()))
    except FileNotFoundError:
        raise GuidekitError(f"image {path}: no such file") from None
    except PICTURE_ERRORS as error:
        raise GuidekitError(f"image {path}: not a readable picture ({error})") from None


def load_references(folder: str | Path) -> dict[str, Reference]:
    """References of a folder of pictures by name: the subfolder's, else the file's stem.

    Large pictures are made smaller, as all of them stay in memory. Raises GuidekitError for a
    folder without pictures and for a name that occurs twice.
    """
    root = Path(folder)
    found: dict[str, Reference] = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURES):
        parent = path.parent.relative_to(root)
        name = file_name("-".join(parent.parts) or path.stem, f"{path}: what it is called by")
        if name in found:
            raise GuidekitError(
                f"{folder} has two pictures for {name!r}, {found[name].path} and {path}; leave one"
            )
        found[name] = load_reference(path)
        _reduce(found[name].picture)
    if not found:
        raise GuidekitError(f"image folder {folder}: no {', '.join(PICTURES)} in it")
    return found


def _reduce(picture: Image.Image) -> None:
    """Makes the picture no larger than its middle square needs, in place."""
    width, height = picture.size
    longest = min(LARGEST, math.ceil(ENOUGH * max(width, height) / max(min(width, height), 1)))
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)


def read_references(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Pictures (R, 3, H, W) in [-1, 1] of size (H, W).

    A name such as scene-3, where there is no such file, is that scene of the held-out split.
    Raises GuidekitError for a file that is no picture.
    """
    return torch.stack([_read(Path(path), size) for path in paths])


def _read(path: Path, size: tuple[int, int]) -> Tensor:
    built_in = BUILT_IN.fullmatch(path.name)
    if path.exists() or built_in is None:
        return read_picture(path, size)
    pixels = _scene(int(built_in[1]), max(size))
    return torch.nn.functional.interpolate(pixels[None], size, mode="area")[0]


def _scene(number: int, size: int) -> Tensor:
    """A held-out scene (3, size, size) in [-1, 1]."""
    return scenes.batch([scenes.scene(number, "test")], size)[0][0]


def square(image: Image.Image, size: int) -> Tensor:
    """The largest centred square as uint8 (3, size, size), upright, transparency on white.

    Raises GuidekitError for pictures of no area, and what Pillow raises for damaged ones.
    """
    image = upright(image)
    if image.mode.startswith("I;16"):  # Pillow cuts what is over 255 where it converts
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        backing = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(backing, image.convert("RGBA"))
    side = min(image.size)
    if side < 1:
        raise GuidekitError("the picture is empty")
    left, top = ((length - side) // 2 for length in image.size)
    image = image.convert("RGB").resize(
        (size, size),
        Image.Resampling.LANCZOS,
        (left, top, left + side, top + side),
        reducing_gap=3.0,
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) to float in [-1, 1]."""
    return pictures.float() / 127.5 - 1
