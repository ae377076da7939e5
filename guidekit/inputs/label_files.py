"""Files of label maps, as people have them, and what their numbers or colours mean.

An indexed or grey PNG of class numbers, a PNG in the colours of a palette, or COCO's panoptic pair
of PNG and JSON.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from guidekit.errors import GuidekitError
from guidekit.images import as_rgb, is_deep, load_image
from guidekit.inputs.panoptic import find_table, read_panoptic
from guidekit.labels import VOID, LabelMap, LabelSet, listed
from guidekit.masks import class_values


def read_label_map(path: str | Path, labels: LabelSet) -> LabelMap:
    """The label map in a file: class numbers, colours of the set's palette, or COCO's panoptic PNG.

    A PNG whose segments a JSON describes is a panoptic one: a JSON of its own name, or its data
    set's, FOLDER.json or panoptic*.json, in or beside its folder. An image of numbers, or with a
    palette of its own, is read by number; where all of its colours are the set's, by colour. Raises
    GuidekitError that names the values or colours that the set has not, and for a JPEG, which
    changes them.
    """
    if (table := find_table(Path(path))) is not None:
        return read_panoptic(path, table, labels)
    return load_image(path, "label map", lambda image: as_label_map(image, labels))


def as_label_map(image: Image.Image, labels: LabelSet) -> LabelMap:
    """The label map that an image is; see `read_label_map`."""
    if image.format in ("JPEG", "MPO"):
        raise GuidekitError("it is a JPEG, which changes the values; save it as PNG")
    numbers = class_values(image)
    if labels.palette and not is_deep(image) and image.mode not in ("L", "1"):
        ids, unknown = _by_colour(np.asarray(as_rgb(image)), labels)
        # An indexed map of classes alone may have the colour of void for one of them.
        if not unknown and (numbers is None or (ids != VOID).any()):
            return LabelMap(torch.from_numpy(ids), labels)
        if numbers is None:
            raise GuidekitError(
                f"{_share(sum(unknown.values()))} of its pixels have colours that label set "
                f"{labels.name!r} has not ({listed(unknown)}); give the set whose palette it is in"
            )
    if numbers is None:
        raise GuidekitError(
            f"it is in colour, and label set {labels.name!r} has no palette; save it as an indexed "
            "PNG, or add `palette` to the set's JSON"
        )
    return LabelMap(torch.from_numpy(_by_number(numbers, labels)), labels)


def _by_number(numbers: np.ndarray, labels: LabelSet) -> np.ndarray:
    """Class indices (H, W) of numbers in a file."""
    void, last = np.isin(numbers, labels.void), labels.first + len(labels) - 1
    outside = ~void & ((numbers < labels.first) | (numbers > last))
    if outside.any():
        beside = f", void {listed(labels.void)}" if labels.void else ""
        raise GuidekitError(
            f"{_share(outside.mean())} of its pixels hold {listed(np.unique(numbers[outside]))}; "
            f"label set {labels.name!r} has {labels.first} to {last}{beside}"
        )
    return np.where(void, VOID, numbers - labels.first)


def _by_colour(colours: np.ndarray, labels: LabelSet) -> tuple[np.ndarray, dict[str, float]]:
    """Class indices (H, W) of colours (H, W, 3), and the shares of colours that are no class.

    Black that is no class is void. Where two classes share a colour it is the first's.
    """
    codes = _codes(colours)
    found, place, counts = np.unique(codes, return_inverse=True, return_counts=True)
    known: dict[int, int] = {0: VOID}
    for index in reversed(range(len(labels))):
        known[int(_codes(np.array(labels.palette[index])))] = index
    ids = np.array([known.get(int(code), VOID) for code in found])
    commonest = np.argsort(-counts, kind="stable").tolist()
    unknown = {
        f"#{found[i]:06x}": counts[i] / codes.size for i in commonest if int(found[i]) not in known
    }
    return ids[place].reshape(codes.shape), unknown


def _codes(colours: np.ndarray) -> np.ndarray:
    """Colours (..., 3) as one number each."""
    red, green, blue = np.moveaxis(colours.astype(np.int64), -1, 0)
    return (red << 16) + (green << 8) + blue


def _share(share: float) -> str:
    return f"{share:.2%}"
