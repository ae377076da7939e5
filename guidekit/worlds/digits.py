"""scikit-learn's 1,797 real handwritten digits, 8x8 pixels, in three fixed splits.

`train` feeds the generator and the labelled shots, `judge` the classifier that scores, `test` the
real images that results are compared with. No image is in two splits.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from guidekit.errors import GuidekitError

SIZE = 8
SPLITS = {"train": slice(0, 1000), "judge": slice(1000, 1400), "test": slice(1400, None)}


@cache
def _shuffled() -> tuple[Tensor, Tensor]:
    """All digits in a fixed order: images in [-1, 1] and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    pictures = torch.from_numpy(found.images[order]).float() / 8 - 1  # 17 grey levels
    return pictures[:, None], torch.from_numpy(found.target[order]).long()


def split(name: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) in [-1, 1] and labels (n,) of a split.

    Raises GuidekitError for a split that does not exist.
    """
    if name not in SPLITS:
        raise GuidekitError(f"no split {name!r}; splits are {', '.join(SPLITS)}")
    pictures, labels = _shuffled()
    return pictures[SPLITS[name]], labels[SPLITS[name]]


def shots(per_class: int, draw: int = 0, split_name: str = "train") -> tuple[Tensor, Tensor]:
    """`per_class` images of every digit, another choice for every `draw`: as `split` has them."""
    pictures, labels = split(split_name)
    rng = np.random.default_rng([draw, per_class])
    chosen = [
        rng.choice(np.flatnonzero(labels.numpy() == digit), per_class, replace=False)
        for digit in range(10)
    ]
    index = torch.from_numpy(np.concatenate(chosen))
    return pictures[index], labels[index]


def write_shots(folder: str | Path, per_class: int, draw: int = 0) -> Path:
    """Writes shots as class folders of PNG files, `folder/7/0.png`, and returns the folder."""
    pictures, labels = shots(per_class, draw)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        path = Path(folder) / str(int(label)) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = ((picture[0] + 1) * 127.5).round().byte().numpy()
        Image.fromarray(grey).save(path)
    return Path(folder)
