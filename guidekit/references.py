"""Reference images: what a user shows in place of, or beside, words."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from PIL import Image
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.images import (
    PLACES,
    Fit,
    as_rgb,
    fitted,
    load_image,
    numbered,
    to_image,
    to_uint8,
    upright,
)
from guidekit.system.untrusted import file_name
from guidekit.worlds import scenes

BUILT_IN = re.compile(r"scene-(\d+)")
SCENE_SIZE = 64  # of built-in references
LARGEST = 1024  # longer side of a folder's references
ENOUGH = 518  # shorter side of the same; encoders see squares at 224 to 518
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, eq=False)
class Reference:
    """An image to follow, and the path that it came from; two are equal if they are one object.

    image: of any mode, or the path of one; it becomes what `images.as_rgb` says it shows, upright.
    fit: what encoders, which read squares, see of one that is none: "crop", its largest middle
    square, "pad", the whole on white, or "crops", three squares along its longer side.
    """

    image: Image.Image
    path: str = ""
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        if self.fit not in get_args(Fit):
            known = ", ".join(get_args(Fit))
            raise GuidekitError(f"a reference's fit is one of {known}, not {self.fit!r}")
        if isinstance(self.image, str | Path):
            loaded = load_reference(self.image)
            object.__setattr__(self, "path", loaded.path)
            object.__setattr__(self, "image", loaded.image)
        elif not isinstance(self.image, Image.Image):
            kind = type(self.image).__name__
            raise GuidekitError(f"a reference is an image or the path of one, not {kind}")
        object.__setattr__(self, "image", as_rgb(upright(self.image)))

    @property
    def picture(self) -> Image.Image:
        """Its image, by the name that it had first."""
        return self.image

    def pixels(self, size: int) -> Tensor:
        """What an encoder sees of it, (3, size, size) in [-1, 1]; of "crops" the middle one."""
        views = self.views(size, self.fit)
        return views[len(views) // 2]

    def views(self, size: int, fit: Fit) -> Tensor:
        """Its squares (V, 3, size, size) in [-1, 1]: V is three of "crops", else one."""
        squares = fitted(self.image, (size, size), fit)
        return to_pixels(torch.stack([to_uint8(square) for square in squares]))


def as_reference(value: object) -> Reference:
    """A reference of whatever a user gives for one: itself, an image, the path of one.

    Raises GuidekitError for anything else.
    """
    if isinstance(value, Reference):
        return value
    if isinstance(value, Image.Image):
        return Reference(value)
    if isinstance(value, str | Path):
        return load_reference(value)
    raise GuidekitError(
        f"a reference is an image, the path of one, or guidekit.Reference, not "
        f"{type(value).__name__}"
    )


def load_reference(path: str | Path) -> Reference:
    """A reference from an image file; GuidekitError that says what is wrong with it.

    A name such as scene-3, where there is no such file, is that scene of the held-out split.
    """
    path = Path(path)
    if (built_in := BUILT_IN.fullmatch(path.name)) and not path.exists():
        return Reference(to_image((_scene(int(built_in[1]), SCENE_SIZE) + 1) / 2), path.name)
    return Reference(load_image(path), str(path.resolve()))


def load_references(folder: str | Path) -> dict[str, Reference]:
    """References of a folder of images by name: the subfolder's, else the file's stem.

    Numbers in names count as numbers. Large images are made smaller, as all of them stay in memory.
    Raises GuidekitError for a folder without images and for a name that occurs twice.
    """
    root = Path(folder)
    found: dict[str, Reference] = {}
    files = (p for p in root.rglob("*") if p.suffix.lower() in PICTURES)
    for path in sorted(files, key=lambda p: numbered(str(p.relative_to(root)))):
        parent = path.parent.relative_to(root)
        name = file_name("-".join(parent.parts) or path.stem, f"{path}: what it is called by")
        if name in found:
            raise GuidekitError(
                f"{folder} has two images for {name!r}, {found[name].path} and {path}; leave one"
            )
        found[name] = Reference(_reduced(load_image(path)), str(path.resolve()))
    if not found:
        raise GuidekitError(f"image folder {folder}: no {', '.join(PICTURES)} in it")
    return found


def _reduced(image: Image.Image) -> Image.Image:
    """The image, no larger than its squares need; it is changed in place."""
    width, height = image.size
    longest = min(LARGEST, math.ceil(ENOUGH * max(width, height) / min(width, height)))
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return image


def read_references(paths: Sequence[Path], size: tuple[int, int], fit: Fit = "crop") -> Tensor:
    """Images (R, 3, H, W) in [-1, 1] of size (H, W); of "crops" each is three, one after another.

    A name such as scene-3, where there is no such file, is that scene of the held-out split.
    Raises GuidekitError for a file that is no image.
    """
    return torch.cat([_read(Path(path), size, fit) for path in paths])


def _read(path: Path, size: tuple[int, int], fit: Fit) -> Tensor:
    built_in = BUILT_IN.fullmatch(path.name)
    if path.exists() or built_in is None:
        parts = fitted(load_image(path), size, fit)
        return to_pixels(torch.stack([to_uint8(part) for part in parts]))
    pixels = _scene(int(built_in[1]), max(size))
    drawn = torch.nn.functional.interpolate(pixels[None], size, mode="area")
    return drawn.repeat(len(PLACES.get(fit, (0.5,))), 1, 1, 1)


def _scene(number: int, size: int) -> Tensor:
    """A held-out scene (3, size, size) in [-1, 1]."""
    return scenes.batch([scenes.scene(number, "test")], size)[0][0]


def square(image: Image.Image, size: int) -> Tensor:
    """The largest middle square as uint8 (3, size, size), upright, as `images.as_rgb` shows it.

    Raises GuidekitError for images of no area, and what Pillow raises for damaged ones.
    """
    return to_uint8(fitted(as_rgb(upright(image)), (size, size))[0])


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) to float in [-1, 1]."""
    return pictures.float() / 127.5 - 1
