"""Segments and layouts as people write them: text, boxes, mask files, JSON."""

import os
from pathlib import Path
from typing import Any

from PIL import ImageColor
from torch import Tensor

from guidekit.conditions import Condition, Segment
from guidekit.errors import GuidekitError
from guidekit.inputs.maps import Map, load_map
from guidekit.masks import Box, box_mask, load_mask, size_of
from guidekit.system.untrusted import inside, read_json


def parse_segment(text: str) -> Segment:
    """`red circle=left.png` or `blue square=0.5,0.5,0.9,0.9`; `@0.7` at the end is the strength.

    Phrases and names of files may hold = and @: it is cut where what follows is a box or a file
    that exists, and the whole is tried before its end is a strength. Raises GuidekitError for a
    text of another form, and for one that names two files.
    """
    cuts = [i for i, sign in enumerate(text) if sign == "="]
    pairs = [(text[:i].strip(), text[i + 1 :].strip()) for i in cuts]
    pairs = [(phrase, place) for phrase, place in pairs if phrase and place]
    if not pairs:
        raise GuidekitError(
            f"segment {text!r}: write PHRASE=MASK.png or PHRASE=left,top,right,bottom"
        )
    known = [pair for pair in pairs if _is_place(pair[1]) or _is_place(_without_strength(pair[1]))]
    if len(known) > 1:
        raise GuidekitError(
            f"segment {text!r} could mean {' or '.join(place for _, place in known)}; rename one"
        )
    phrase, place = (known or pairs)[-1]
    place, strength = _cut_strength(place, text)
    if (box := _numbers(place)) is not None:
        return Segment(phrase, box_mask(box), strength, box=box)
    mask = load_mask(place)
    return Segment(phrase, mask, strength, size=size_of(mask))


def _is_place(text: str) -> bool:
    """Whether it is four numbers or a file that exists."""
    return _numbers(text) is not None or os.path.exists(text)


def _without_strength(text: str) -> str:
    """The text up to its last @."""
    return text.rpartition("@")[0].strip() or text


def _cut_strength(place: str, where: str) -> tuple[str, float]:
    """The place, and the strength after its last @ where it is not of a file's name."""
    head = _without_strength(place)
    if _is_place(place) or head == place:
        return place, 1.0
    try:
        return head, float(place.rpartition("@")[2])
    except ValueError:
        if not _is_place(head):
            return place, 1.0
        raise GuidekitError(f"segment {where!r}: the strength after @ must be a number") from None


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


LAYOUT_KEYS = {"prompt", "negative", "label", "segments", "map"}


PLACE_KEYS = {"box", "mask", "value"}
WORD_KEYS = {"phrase", "tokens", "occurrence", "prompt", "negative", "strength"}
SEGMENT_KEYS = PLACE_KEYS | WORD_KEYS


def load_layout(path: str | Path) -> Condition:
    """A condition from a JSON file.

    `{"prompt": ..., "negative": ..., "label": 3, "map": "layout.png", "segments": [{"phrase": "red
    circle", "box": [l, t, r, b] | "mask": "left.png" | "value": 3 | "#ff0000", "strength":
    1.0, "occurrence": 2 | "tokens": [4, 5]}]}`. `value` is a number of the image `map` (a palette's
    index, or a grey of 8 to 32 bits), or a colour that it shows; of a JPEG the pixels count that
    are nearer to it than to any other colour of the layout or the map. `occurrence` and `tokens`
    are as in `Segment`. Paths are relative to the file. Raises GuidekitError that names the key at
    fault.
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
    drawn = None if place is None else load_map(place, _named_colours(segments))
    parsed = tuple(
        _parse_entry(entry, drawn, folder, f"{where}: segment {i}")
        for i, entry in enumerate(segments)
    )
    return Condition(layout.get("prompt", ""), layout.get("negative", ""), parsed, label)


def _check_keys(entry: Any, known: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise GuidekitError(f"{where}: expected an object with the keys {', '.join(sorted(known))}")
    for key in entry:
        if key not in known:
            raise GuidekitError(f"{where}: no key {key!r}; it has {', '.join(sorted(known))}")


def _named_colours(segments: list[Any]) -> list[tuple[int, ...]]:
    """The colours that a layout's segments name."""
    values = [entry.get("value") for entry in segments if isinstance(entry, dict)]
    colours = (_colour(value) for value in values if isinstance(value, str))
    return [colour for colour in colours if colour is not None]


def _colour(text: str) -> tuple[int, ...] | None:
    """Red, green and blue of #ff0000 or a name; None for another text."""
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        return None


def _parse_entry(entry: Any, drawn: Map | None, folder: Path, where: str) -> Segment:
    _check_keys(entry, SEGMENT_KEYS, where)
    for key in ("phrase", "mask", "prompt", "negative"):
        if not isinstance(entry.get(key, ""), str):
            raise GuidekitError(f"{where}: `{key}` must be a text")
    if not _is_number(entry.get("strength", 1.0)):
        raise GuidekitError(f"{where}: `strength` must be a number")
    places = [key for key in ("box", "mask", "value") if key in entry]
    if len(places) != 1 or "phrase" not in entry:
        raise GuidekitError(f"{where}: give `phrase` and one of `box`, `mask`, `value`")
    if not isinstance(tokens := entry.get("tokens"), list | type(None)):
        raise GuidekitError(f"{where}: `tokens` must be a list of columns")
    box = _box(entry["box"], where) if "box" in entry else None
    try:
        mask = _mask(entry, box, drawn, folder)
        return Segment(
            entry["phrase"],
            mask,
            float(entry.get("strength", 1.0)),
            prompt=entry.get("prompt"),
            negative=entry.get("negative", ""),
            box=box,
            tokens=None if tokens is None else tuple(tokens),
            occurrence=entry.get("occurrence"),
            size=size_of(mask) if box is None else None,
        )
    except ValueError as error:
        raise GuidekitError(f"{where}: {error}") from None


def _mask(entry: dict[str, Any], box: Box | None, drawn: Map | None, folder: Path) -> Tensor:
    """The mask of an entry, whose box was read already."""
    if box is not None:
        return box_mask(box)
    if "mask" in entry:
        return load_mask(inside(folder, entry["mask"], "`mask`"))
    if drawn is None:
        raise GuidekitError("`value` needs the layout's `map`, an image")
    return drawn.mask(entry["value"])


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
