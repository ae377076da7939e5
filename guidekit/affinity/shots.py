"""Shots: a few images with their label maps, as `guidekit fit` reads them too.

    shots/images/1.png  shots/masks/1.png  shots/classes.json

`classes.json` is a label set; masks are indexed, or in the colours of its palette.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.heads.data import image_files
from guidekit.images import load_image, to_uint8
from guidekit.inputs.label_files import read_label_map
from guidekit.labels import LabelMap, LabelSet, load_label_set, parse_label_set
from guidekit.system.untrusted import read_object

CLASSES = "classes.json"


@dataclass(frozen=True, eq=False)
class Shot:
    """An image (3, H, W) in [-1, 1] and the class of each of its pixels.

    Raises GuidekitError for a map of another size.
    """

    pixels: Tensor
    map: LabelMap

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[1:] != self.map.ids.shape:
            raise GuidekitError(
                f"a shot is an image (3, H, W) and a map (H, W) of one size, not "
                f"{tuple(self.pixels.shape)} and {tuple(self.map.ids.shape)}"
            )


class Shots(Sequence[Shot]):
    """The shots of a folder, each read when it is needed."""

    def __init__(self, pairs: list[tuple[Path, Path]], labels: LabelSet):
        self.pairs, self.labels = pairs, labels

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index):
        image, mask = self.pairs[index]
        pixels = to_uint8(load_image(image)).float() / 127.5 - 1
        found = read_label_map(mask, self.labels)
        if found.ids.shape != pixels.shape[1:]:
            raise GuidekitError(
                f"{mask} has {found.ids.shape[1]}x{found.ids.shape[0]} pixels, its image "
                f"{pixels.shape[2]}x{pixels.shape[1]}; they must be the same"
            )
        return Shot(pixels, found)


def read_shots(folder: str | Path, labels: LabelSet | str | None = None) -> Shots:
    """The shots of a folder. labels: their label set, by default the folder's classes.json.

    Raises GuidekitError that names what is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise GuidekitError(f"{folder} is no folder; give one with images/ and masks/")
    if labels is None:
        if not (folder / CLASSES).is_file():
            raise GuidekitError(
                f"{folder} has no {CLASSES}, the label set of its masks; add one, such as "
                '{"classes": ["sky", "grass"]} (guidekit affinity also takes --target SET)'
            )
        table = read_object(folder / CLASSES)
        labels = parse_label_set(table, folder.resolve().name, f"label set {folder / CLASSES}")
    own = labels if isinstance(labels, LabelSet) else load_label_set(labels)
    for name in ("images", "masks"):
        if not (folder / name).is_dir() or not image_files(folder / name):
            raise GuidekitError(f"{folder / name} has no images; images/ and masks/ go by stem")
    images, masks = (image_files(folder / name) for name in ("images", "masks"))
    by_stem = {mask.stem: mask for mask in masks}
    stems = {image.stem for image in images}
    if lonely := sorted(stems.symmetric_difference(by_stem)):
        more = f" and {len(lonely) - 1} others lack" if len(lonely) > 1 else " lacks"
        raise GuidekitError(f"{folder}: {lonely[0]!r}{more} image or mask")
    return Shots([(image, by_stem[image.stem]) for image in images], own)


def batch_of(shots: Sequence[Shot], labels: LabelSet, what: str) -> Sequence[Shot]:
    """The shots, whose maps are of the set. Raises GuidekitError for none, or another set."""
    if not len(shots):
        raise GuidekitError(f"{what} are none; give at least one image with its map")
    sets = [shots.labels] if isinstance(shots, Shots) else [shot.map.labels for shot in shots]
    for found in sets:
        if found.classes != labels.classes:
            raise GuidekitError(
                f"{what} are labelled with {found.name!r}, not {labels.name!r}; give those of that "
                "set"
            )
    return shots


def seen(shots: Sequence[Shot], count: int) -> Tensor:
    """Pixels (count,) of every class in the shots."""
    total = torch.zeros(count, dtype=torch.float64)
    for shot in shots:
        ids = shot.map.ids
        total += torch.bincount(ids[ids >= 0], minlength=count)
    return total
