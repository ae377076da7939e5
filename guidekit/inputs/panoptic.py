"""COCO's panoptic format: the categories of an image's segments, as a label map.

A PNG holds the number of a segment in its red, green and blue. A JSON says what the numbers are, of
this image alone (`segments_info`) or of a whole data set (`annotations`, `categories`).
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from guidekit.errors import GuidekitError
from guidekit.images import as_rgb, load_image
from guidekit.labels import VOID, LabelMap, LabelSet, listed
from guidekit.system.untrusted import read_object, read_text


def find_table(path: Path) -> Path | None:
    """The JSON that describes the segments of a PNG; None if there is none, so that it has none.

    That is one of its own name, else, of a PNG in colour, one that lists it: FOLDER.json or
    panoptic*.json, in or beside its folder. Raises GuidekitError for a panoptic*.json that cannot
    be read.
    """
    own, folder = path.with_suffix(".json"), path.absolute().parent
    if own.is_file() and "segments_info" in read_text(own):
        return own
    if not _in_colour(path):  # maps of numbers often have the names of the panoptic ones
        return None
    beside = folder.with_name(f"{folder.name}.json")
    if beside.is_file() and _is_table(beside) and _lists(beside, path.name):
        return beside
    near = (found for place in (folder, folder.parent) for found in place.glob("panoptic*.json"))
    return next((table for table in sorted(near) if _lists(table, path.name)), None)


def _in_colour(path: Path) -> bool:
    """Whether an image has red, green and blue; False for what is none, which others refuse."""
    return path.is_file() and load_image(path, "label map", lambda i: i.mode in ("RGB", "RGBA"))


def _is_table(path: Path) -> bool:
    """Whether a JSON of any name holds an object: a folder of maps may lie beside a stranger."""
    try:
        return bool(_read(path))
    except GuidekitError:
        return False


def read_panoptic(path: str | Path, table: str | Path, labels: LabelSet) -> LabelMap:
    """COCO's panoptic format: a PNG of segment numbers, and a JSON that says what each one is.

    table: the JSON of this image (`segments_info`), or of a whole data set (`annotations`), with or
    without `categories`; without them `category_id` is an id of the set's, which counts from 1
    where the set has none. Pixels of no segment are void. Raises GuidekitError that names a segment
    or a category without meaning.
    """
    segments, names = _segment_categories(Path(table), Path(path).name)
    own = labels.category_ids or range(1, len(labels) + 1)
    names = names or dict(zip(own, labels.classes, strict=True))
    if lost := [category for category in segments.values() if category not in names]:
        raise GuidekitError(
            f"panoptic {table} does not say what category {lost[0]} is; add `categories` to it"
        )
    known = {0: VOID} | {number: labels.index(names[c]) for number, c in segments.items()}
    numbers = load_image(path, "panoptic map", _segment_numbers)
    values, place = np.unique(numbers, return_inverse=True)
    if lost := [v for v in values.tolist() if v not in known]:
        raise GuidekitError(
            f"panoptic {table} says nothing of the segments {listed(lost)} of {path}"
        )
    ids = np.array([known[v] for v in values.tolist()])[place].reshape(numbers.shape)
    return LabelMap(torch.from_numpy(ids), labels)


def _segment_categories(table: Path, name: str) -> tuple[dict[int, int], dict[int, str]]:
    """Category ids of an image's segments by their numbers, and names of categories by their ids.

    name: the PNG's. The second is empty where the JSON has no `categories`. Raises GuidekitError
    for a JSON that is not in COCO's form, or says nothing of the image.
    """
    where, found = f"panoptic {table}", _read(table)
    rows = _rows(found) if "annotations" in found else [found]
    own = [row for row in rows if row.get("file_name", name) == name and "segments_info" in row]
    if len(own) != 1:
        raise GuidekitError(f"{where} has no `segments_info` of {name}; give the JSON beside it")
    try:
        segments = {int(s["id"]): int(s["category_id"]) for s in own[0]["segments_info"]}
        return segments, {int(c["id"]): str(c["name"]) for c in found.get("categories", [])}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise GuidekitError(f"{where} is not in COCO's form ({error!r})") from None


def _segment_numbers(image: Image.Image) -> np.ndarray:
    """The number of every pixel's segment (H, W); 0 for none."""
    red, green, blue = np.moveaxis(np.asarray(as_rgb(image)).astype(np.int64), -1, 0)
    return red + (green << 8) + (blue << 16)


def _rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    """The images that a data set's JSON describes."""
    rows = table.get("annotations")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _lists(table: Path, name: str) -> bool:
    """Whether a JSON describes the segments of that image."""
    rows = _rows(_read(table))
    return any(row.get("file_name") == name and "segments_info" in row for row in rows)


def _read(table: Path) -> dict[str, Any]:
    return _parsed(table, table.stat().st_mtime_ns)


@lru_cache(maxsize=2)  # one of a data set is asked for every image of it
def _parsed(table: Path, changed: int) -> dict[str, Any]:
    return read_object(table)
