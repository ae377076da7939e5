"""Segments and layouts as people write them: text, boxes, mask files, JSON."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

from guidekit.conditions import Condition, Segment
from guidekit.errors import GuidekitError
from guidekit.images import PICTURE_ERRORS
from guidekit.masks import Box, box_mask, load_mask
from guidekit.untrusted import inside, open_picture, read_json


def parse_segment(text: str) -> Segment:
    """`red circle=left.png` or `blue square=0.5,0.5,0.9,0.9`; `@0.7` at the end is the strength.

    Raises GuidekitError for a text of another form.
    """
    phrase, equals, place = text.rpartition("=")
    if not equals or not phrase.strip() or not place.strip():
        raise GuidekitError(
            f"segment {text!r}: write PHRASE=MASK.png or PHRASE=left,top,right,bottom"
        )
    place, at, strength = place.partition("@")
    numbers = _numbers(place)
    mask = load_mask(place.strip()) if numbers is None else box_mask(numbers)
    return Segment(phrase.strip(), mask, _strength(strength, text) if at else 1.0, box=numbers)


def _numbers(text: str) -> Box | None:
    """Four numbers, or None if the text is not a list of numbers."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    if len(numbers) != 4:
        raise GuidekitError(f"box {text}: give four numbers, left,top,right,bottom")
    left, top, right, bottom = numbers
    return left, top, right, bottom


def _strength(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise GuidekitError(f"segment {where!r}: the strength after @ must be a number") from None


LAYOUT_KEYS = {"prompt", "negative", "label", "segments", "map"}


PLACE_KEYS = {"box", "mask", "value"}
WORD_KEYS = {"phrase", "tokens", "occurrence", "prompt", "negative", "strength"}
SEGMENT_KEYS = PLACE_KEYS | WORD_KEYS


def load_layout(path: str | Path) -> Condition:
    """A condition from a JSON file.

    `{"prompt": ..., "negative": ..., "label": 3, "map": "layout.png", "segments": [{"phrase": "red
    circle", "box": [l, t, r, b] | "mask": "left.png" | "value": 3 | "#ff0000", "strength":
    1.0, "occurrence": 2 | "tokens": [4, 5]}]}`; `value` is an index or a colour of the picture
    `map`; `occurrence` and `tokens` as in `Segment`. Paths are relative to the file.
    Raises GuidekitError that names the key at fault.
    """
    path = Path(path)
    try:
        layout = read_json(path)
    except FileNotFoundError:
        raise GuidekitError(f"layout {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise GuidekitError(f"layout {path}: not a readable JSON file ({error})") from None
    return parse_layout(layout, path.parent, f"layout {path}")


def parse_layout(layout: Any, folder: Path, where: str) -> Condition:
    """A condition from what a layout file holds; paths are relative to `folder`.

    Raises GuidekitError that begins with `where` and names the key at fault.
    """
    _check_keys(layout, LAYOUT_KEYS, where)
    segments = layout.get("segments", [])
    if not isinstance(segments, list):
        raise GuidekitError(f"{where}: `segments` must be a list")
    for key in ("prompt", "negative", "map"):
        if not isinstance(layout.get(key, ""), str):
            raise GuidekitError(f"{where}: `{key}` must be a text")
    label = layout.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
        raise GuidekitError(f"{where}: `label` must be a whole number")
    place = inside(folder, layout["map"], f"{where}: `map`") if "map" in layout else None
    picture = None if place is None else _load_map(place)
    parsed = tuple(
        _parse_entry(entry, picture, folder, f"{where}: segment {i}")
        for i, entry in enumerate(segments)
    )
    return Condition(layout.get("prompt", ""), layout.get("negative", ""), parsed, label)


def _check_keys(entry: Any, known: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise GuidekitError(f"{where}: expected an object with the keys {', '.join(sorted(known))}")
    for key in entry:
        if key not in known:
            raise GuidekitError(f"{where}: no key {key!r}; it has {', '.join(sorted(known))}")


def _load_map(path: Path) -> np.ndarray:
    """A layout picture: `(H, W)` indices of a palette or grey picture, else `(H, W, 3)` colours."""
    try:
        with open_picture(path) as image:
            image.load()
            return np.array(image if image.mode in ("P", "L") else image.convert("RGB"))
    except PICTURE_ERRORS as error:
        raise GuidekitError(f"layout map {path}: not a readable picture ({error})") from None


def _parse_entry(entry: Any, picture: np.ndarray | None, folder: Path, where: str) -> Segment:
    _check_keys(entry, SEGMENT_KEYS, where)
    for key in ("phrase", "mask", "prompt", "negative"):
        if not isinstance(entry.get(key, ""), str):
            raise GuidekitError(f"{where}: `{key}` must be a text")
    if not _is_number(entry.get("strength", 1.0)):
        raise GuidekitError(f"{where}: `strength` must be a number")
    places = [key for key in ("box", "mask", "value") if key in entry]
    if len(places) != 1 or "phrase" not in entry:
        raise GuidekitError(f"{where}: give `phrase` and one of `box`, `mask`, `value`")
    box = None
    if places == ["box"]:
        box = _box(entry["box"], where)
        try:
            mask = box_mask(box)
        except ValueError as error:
            raise GuidekitError(f"{where}: {error}") from None
    elif places == ["mask"]:
        mask = load_mask(inside(folder, entry["mask"], f"{where}: `mask`"))
    else:
        mask = _select(picture, entry["value"], where)
    more = {"prompt": entry.get("prompt"), "negative": entry.get("negative", "")}
    if not isinstance(tokens := entry.get("tokens"), list | type(None)):
        raise GuidekitError(f"{where}: `tokens` must be a list of columns")
    more |= {"tokens": tokens, "occurrence": entry.get("occurrence")}
    try:
        return Segment(entry["phrase"], mask, float(entry.get("strength", 1.0)), box=box, **more)
    except GuidekitError as error:
        raise GuidekitError(f"{where}: {error}") from None


def _is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold; NaN and infinity pass."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 10**300


def _box(box: Any, where: str) -> Box:
    numbers = isinstance(box, list) and all(map(_is_number, box))
    if not numbers or len(box) != 4:
        raise GuidekitError(f"{where}: `box` must be four numbers [left, top, right, bottom]")
    left, top, right, bottom = map(float, box)
    return left, top, right, bottom


def _select(picture: np.ndarray | None, value: Any, where: str) -> Tensor:
    """Mask of the pixels of the layout picture that hold an index or a colour."""
    if picture is None:
        raise GuidekitError(f"{where}: `value` needs the layout's `map`, a picture")
    if picture.ndim == 2:
        if not isinstance(value, int) or isinstance(value, bool):
            raise GuidekitError(f"{where}: the map is indexed, so `value` must be an integer")
        found, exist = picture == value, ", ".join(map(str, np.unique(picture)[:20]))
    else:
        found = (picture == _colour(value, where)).all(-1)
        colours = np.unique(picture.reshape(-1, 3), axis=0)[:20]
        exist = ", ".join("#" + bytes(c).hex() for c in colours)
    if not found.any():
        raise GuidekitError(f"{where}: no pixel of the map is {value}; it holds {exist}")
    return torch.from_numpy(found).float()


def _colour(value: Any, where: str) -> tuple[int, ...]:
    try:
        return ImageColor.getrgb(value)[:3]
    except (ValueError, AttributeError, TypeError):
        raise GuidekitError(
            f"{where}: the map is in colour, so `value` must be a colour such as #ff0000"
        ) from None
