"""Images with dense targets: a depth, an edge map, a colour at every pixel, read when needed.

pairs/images/1.png pairs/targets/1.png     grey or colour, 8 or 16 bit: values from 0 to 1
pairs/images/2.png pairs/targets/2.npy     (h, w) or (C, h, w) of numbers as they are; NaN is free
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.heads.data import image_files
from guidekit.images import fitted, load_image, middle, numbered, to_uint8

DEEP = {"I", "I;16", "I;16B", "I;16L"}  # Pillow's modes of 16 bits


@dataclass(frozen=True)
class Pairs:
    """Images (C, H, W) in [-1, 1] and their targets (D, h, w), both by number; nothing is kept."""

    count: int
    image: Callable[[int], Tensor]
    target: Callable[[int], Tensor]

    def __len__(self) -> int:
        return self.count

    def batch(self, numbers: list[int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Some images (B, C, H, W), and their targets (B, D, h, w) at the grid."""
        targets = [at_grid(self.target(i), grid) for i in numbers]
        if len({len(target) for target in targets}) > 1:
            raise GuidekitError("the targets have different numbers of channels; make them alike")
        return torch.stack([self.image(i) for i in numbers]), torch.stack(targets)


def read_pairs(path: str | Path, size: tuple[int, int], channels: int = 3) -> Pairs:
    """The pairs of a folder with images/ and targets/ by stem, cut and resized to `size` (H, W).

    Raises GuidekitError for a folder without them, and for an image or a target without the other.
    """
    path = Path(path)
    folder, wanted = path / "images", path / "targets"
    if not folder.is_dir() or not wanted.is_dir():
        raise GuidekitError(f"{path} has no images/ and targets/, which go together by stem")
    files = image_files(folder)
    found = {p.stem: p for p in [*image_files(wanted), *wanted.glob("*.npy")]}
    stems = {file.stem for file in files}
    if lonely := sorted(stems.symmetric_difference(found), key=numbered):
        raise GuidekitError(
            f"{path}: {lonely[0]!r} and {len(lonely) - 1} others lack image or target"
        )
    if not files:
        raise GuidekitError(f"{folder} has no images")

    def image(i: int) -> Tensor:
        (shown,) = fitted(load_image(files[i]), size)
        values = to_uint8(shown.convert("L").convert("RGB") if channels == 1 else shown)
        return values[:channels].float() / 127.5 - 1

    def target(i: int) -> Tensor:
        return cut(read_target(found[files[i].stem]), size)

    return Pairs(len(files), image, target)


def read_target(path: Path) -> Tensor:
    """A dense target (D, h, w) of a file: .npy as it is, an image in [0, 1].

    Raises GuidekitError for a file that holds none.
    """
    if path.suffix != ".npy":
        return load_image(path, "target", _values)
    try:
        values = np.load(path, allow_pickle=False)
        target = torch.from_numpy(np.asarray(values, np.float32))
    except (OSError, ValueError) as error:
        raise GuidekitError(f"{path} is no array of numbers ({error})") from None
    if target.ndim not in (2, 3) or not target.numel():
        raise GuidekitError(f"{path} is {tuple(target.shape)}; a target is (h, w) or (D, h, w)")
    return target[None] if target.ndim == 2 else target


def _values(image: Image.Image) -> Tensor:
    if image.mode in DEEP:
        return torch.from_numpy(np.asarray(image, np.float32))[None] / 65535
    grey = image.mode in ("1", "L", "LA")
    values = to_uint8(image.convert("RGB")).float() / 255
    return values[:1] if grey else values


def cut(target: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of a target (D, h, w) that an image of its shape keeps at `size` (H, W)."""
    left, top, right, bottom = middle((target.shape[2], target.shape[1]), size)
    return target[:, round(top) : round(bottom), round(left) : round(right)]


def at_grid(target: Tensor, grid: tuple[int, int]) -> Tensor:
    """A target (D, h, w) at a grid; NaN where a pixel's neighbours are."""
    if tuple(target.shape[-2:]) == tuple(grid):
        return target
    smaller = target.shape[-1] >= grid[1]
    mode = {"mode": "area"} if smaller else {"mode": "bilinear"}
    return F.interpolate(target[None], grid, **mode)[0]
