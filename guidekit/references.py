"""Reference pictures of guidances: from files, or scenes by number where no file is at hand."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from guidekit import scenes
from guidekit.pictures import read_picture

BUILT_IN = re.compile(r"scene-(\d+)")


def read_references(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Pictures (R, 3, H, W) in [-1, 1] of size (H, W).

    A name such as scene-3, where there is no such file, is that scene of the held-out split.
    Raises ValueError for a file that is no picture.
    """
    return torch.stack([_read(Path(path), size) for path in paths])


def _read(path: Path, size: tuple[int, int]) -> Tensor:
    built_in = BUILT_IN.fullmatch(path.name)
    if path.exists() or built_in is None:
        return read_picture(path, size)
    pixels, _ = scenes.batch([scenes.scene(int(built_in[1]), "test")], max(size))
    return torch.nn.functional.interpolate(pixels, size, mode="area")[0]
