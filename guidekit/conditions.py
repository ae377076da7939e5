"""What the user wants in one picture: a prompt, and phrases of it with masks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageColor
from torch import Tensor

from guidekit.pictures import PICTURE_ERRORS
from guidekit.references import Reference
from guidekit.untrusted import inside, open_picture, read_json


@dataclass(frozen=True)
class Segment:
    """A phrase of the prompt and the place where it should appear.

    mask: `(H, W)` in [0, 1], any size, soft edges allowed; it is resized with the picture.
    strength: factor on what a guidance does for this segment.
    prompt, negative: texts of the region for methods that denoise it by itself (MultiDiffusion);
    the default prompt is the phrase.

    Raises ValueError for an empty phrase and for a mask that is empty, not finite, outside [0, 1]
    or not two-dimensional.
    """

    phrase: str
    mask: Tensor
    strength: float = 1.0
    prompt: str | None = None
    negative: str = ""
    box: tuple[float, ...] | None = None  # where the mask came from, if from a box

    def __post_init__(self):
        where = f"segment {self.phrase!r}"
        if not self.phrase.strip():
            raise ValueError("a segment has an empty phrase; name words of the prompt")
        if self.mask.ndim != 2:
            raise ValueError(f"{where}: a mask is (H, W), this one is {tuple(self.mask.shape)}")
        if not torch.isfinite(self.mask).all():
            raise ValueError(f"{where}: the mask holds NaN or infinity; use values from 0 to 1")
        if self.mask.min() < 0 or self.mask.max() > 1:
            raise ValueError(
                f"{where}: mask values lie from 0 to 1, these reach {_range(self.mask)}"
            )
        if self.mask.max() == 0:
            raise ValueError(f"{where}: the mask is empty; mark at least one pixel")
        if not np.isfinite(self.strength):
            raise ValueError(f"{where}: the strength must be finite, not {self.strength}")


@dataclass(frozen=True)
class Condition:
    """Everything asked of one picture."""

    prompt: str = ""
    negative: str = ""
    segments: tuple[Segment, ...] = field(default=())
    label: int | None = None  # of models that are conditioned on classes
    image: Reference | None = None  # a picture to follow

    @property
    def content(self) -> str | int:
        """What the picture is of: its class where it has one, else its prompt."""
        return self.prompt if self.label is None else self.label


Layouts = Sequence[Segment] | Condition | Sequence[Condition | Sequence[Segment]]


def spread_layouts(given: Layouts, prompts: int, count: int) -> list[Condition]:
    """One layout for each of `count` pictures of every prompt, in the order of diffusers' batches.

    given: segments or a Condition for all, or a list with one entry per prompt or per picture.
    Raises ValueError for a list of another length.
    """
    if isinstance(given, Condition) or all(isinstance(s, Segment) for s in given):
        return [_layout(given)] * (prompts * count)
    if len(given) == prompts:
        return [_layout(g) for g in given for _ in range(count)]
    if len(given) == prompts * count:
        return [_layout(g) for g in given]
    raise ValueError(
        f"{len(given)} layouts for {prompts} prompts with {count} pictures each; give one for all, "
        "one per prompt or one per picture"
    )


def _layout(given: Condition | Sequence[Segment]) -> Condition:
    return given if isinstance(given, Condition) else Condition(segments=tuple(given))


def with_prompts(layout: Condition, prompt: str, negative: str) -> Condition:
    """The layout under these prompts; ValueError if it names others, but for case and spaces."""
    for own, called in ((layout.prompt, prompt), (layout.negative, negative)):
        if own and own.lower().split() != called.lower().split():
            raise ValueError(f"the layout's prompt is {own!r}, that of the call is {called!r}")
    return replace(layout, prompt=prompt, negative=negative)


def _range(x: Tensor) -> str:
    return f"{float(x.min()):g} to {float(x.max()):g}"


def box_mask(box: tuple[float, float, float, float], size: int = 256) -> Tensor:
    """Mask `(size, size)` of the box left, top, right, bottom in fractions of the picture.

    Pixels that the box cuts get the share that it covers. Raises ValueError for a box that is
    inverted, empty or outside the picture.
    """
    left, top, right, bottom = box
    if not all(np.isfinite(box)) or not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            f"box {','.join(f'{b:g}' for b in box)}: give left,top,right,bottom as fractions with "
            "0 <= left < right <= 1 and 0 <= top < bottom <= 1"
        )
    edges = torch.arange(size + 1, dtype=torch.float64) / size

    def cover(low: float, high: float) -> Tensor:
        return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * size

    return (cover(top, bottom)[:, None] * cover(left, right)[None]).float()


def load_mask(path: str | Path) -> Tensor:
    """Mask `(H, W)` in [0, 1] from a grey picture; of one with transparency, its opacity."""
    try:
        with open_picture(path) as image:
            image.load()
            channel = image.getchannel("A") if "A" in image.getbands() else image.convert("L")
            return torch.from_numpy(np.array(channel)).float() / 255
    except FileNotFoundError:
        raise ValueError(f"mask {path}: no such file") from None
    except PICTURE_ERRORS as error:
        raise ValueError(f"mask {path}: not a readable picture ({error})") from None


def parse_segment(text: str) -> Segment:
    """`red circle=left.png` or `blue square=0.5,0.5,0.9,0.9`; `@0.7` at the end is the strength.

    Raises ValueError for a text of another form.
    """
    phrase, equals, place = text.rpartition("=")
    if not equals or not phrase.strip() or not place.strip():
        raise ValueError(f"segment {text!r}: write PHRASE=MASK.png or PHRASE=left,top,right,bottom")
    place, at, strength = place.partition("@")
    numbers = _numbers(place)
    mask = load_mask(place.strip()) if numbers is None else box_mask(numbers)
    return Segment(phrase.strip(), mask, _strength(strength, text) if at else 1.0, box=numbers)


def _numbers(text: str) -> tuple[float, ...] | None:
    """Four numbers, or None if the text is not a list of numbers."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        return None
    if len(numbers) != 4:
        raise ValueError(f"box {text}: give four numbers, left,top,right,bottom")
    return numbers


def _strength(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"segment {where!r}: the strength after @ must be a number") from None


LAYOUT_KEYS = {"prompt", "negative", "label", "segments", "map"}
SEGMENT_KEYS = {"phrase", "box", "mask", "value", "strength", "prompt", "negative"}


def load_layout(path: str | Path) -> Condition:
    """A condition from a JSON file.

    `{"prompt": ..., "negative": ..., "label": 3, "map": "layout.png", "segments": [{"phrase": "red
    circle", "box": [l, t, r, b] | "mask": "left.png" | "value": 3 | "#ff0000", "strength":
    1.0}]}`; `value` is an index or a colour of the picture `map`. Paths are relative to the file.
    Raises ValueError that names the key at fault.
    """
    path = Path(path)
    try:
        layout = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"layout {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"layout {path}: not a readable JSON file ({error})") from None
    return parse_layout(layout, path.parent, f"layout {path}")


def parse_layout(layout: object, folder: Path, where: str) -> Condition:
    """A condition from what a layout file holds; paths are relative to `folder`.

    Raises ValueError that begins with `where` and names the key at fault.
    """
    _check_keys(layout, LAYOUT_KEYS, where)
    segments = layout.get("segments", [])
    if not isinstance(segments, list):
        raise ValueError(f"{where}: `segments` must be a list")
    for key in ("prompt", "negative", "map"):
        if not isinstance(layout.get(key, ""), str):
            raise ValueError(f"{where}: `{key}` must be a text")
    label = layout.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
        raise ValueError(f"{where}: `label` must be a whole number")
    place = inside(folder, layout["map"], f"{where}: `map`") if "map" in layout else None
    picture = None if place is None else _load_map(place)
    parsed = tuple(
        _parse_entry(entry, picture, folder, f"{where}: segment {i}")
        for i, entry in enumerate(segments)
    )
    return Condition(layout.get("prompt", ""), layout.get("negative", ""), parsed, label)


def _check_keys(entry: object, known: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with the keys {', '.join(sorted(known))}")
    for key in entry:
        if key not in known:
            raise ValueError(f"{where}: no key {key!r}; it has {', '.join(sorted(known))}")


def _load_map(path: Path) -> np.ndarray:
    """A layout picture: `(H, W)` indices of a palette or grey picture, else `(H, W, 3)` colours."""
    try:
        with open_picture(path) as image:
            image.load()
            return np.array(image if image.mode in ("P", "L") else image.convert("RGB"))
    except PICTURE_ERRORS as error:
        raise ValueError(f"layout map {path}: not a readable picture ({error})") from None


def _parse_entry(entry: object, picture: np.ndarray | None, folder: Path, where: str) -> Segment:
    _check_keys(entry, SEGMENT_KEYS, where)
    for key in ("phrase", "mask", "prompt", "negative"):
        if not isinstance(entry.get(key, ""), str):
            raise ValueError(f"{where}: `{key}` must be a text")
    if not _is_number(entry.get("strength", 1.0)):
        raise ValueError(f"{where}: `strength` must be a number")
    places = [key for key in ("box", "mask", "value") if key in entry]
    if len(places) != 1 or "phrase" not in entry:
        raise ValueError(f"{where}: give `phrase` and one of `box`, `mask`, `value`")
    box = None
    if places == ["box"]:
        box = _box(entry["box"], where)
        try:
            mask = box_mask(box)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    elif places == ["mask"]:
        mask = load_mask(inside(folder, entry["mask"], f"{where}: `mask`"))
    else:
        mask = _select(picture, entry["value"], where)
    texts = {"prompt": entry.get("prompt"), "negative": entry.get("negative", "")}
    return Segment(entry["phrase"], mask, float(entry.get("strength", 1.0)), box=box, **texts)


def _is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold; NaN and infinity pass."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 10**300


def _box(box: object, where: str) -> tuple[float, ...]:
    numbers = isinstance(box, list) and all(map(_is_number, box))
    if not numbers or len(box) != 4:
        raise ValueError(f"{where}: `box` must be four numbers [left, top, right, bottom]")
    return tuple(map(float, box))


def _select(picture: np.ndarray | None, value: object, where: str) -> Tensor:
    """Mask of the pixels of the layout picture that hold an index or a colour."""
    if picture is None:
        raise ValueError(f"{where}: `value` needs the layout's `map`, a picture")
    if picture.ndim == 2:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{where}: the map is indexed, so `value` must be an integer")
        found, exist = picture == value, ", ".join(map(str, np.unique(picture)[:20]))
    else:
        found = (picture == _colour(value, where)).all(-1)
        colours = np.unique(picture.reshape(-1, 3), axis=0)[:20]
        exist = ", ".join("#" + bytes(c).hex() for c in colours)
    if not found.any():
        raise ValueError(f"{where}: no pixel of the map is {value}; it holds {exist}")
    return torch.from_numpy(found).float()


def _colour(value: object, where: str) -> tuple[int, ...]:
    try:
        return ImageColor.getrgb(value)[:3]
    except (ValueError, AttributeError, TypeError):
        raise ValueError(
            f"{where}: the map is in colour, so `value` must be a colour such as #ff0000"
        ) from None


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Mask `(H, W)` to `(height, width)`: the mean over each target pixel (soft targets, R8)."""
    return F.interpolate(mask[None, None].float(), (height, width), mode="area")[0, 0]


def segment_masks(conditions: list[Condition], height: int, width: int) -> Tensor:
    """Masks `(B, S, height, width)`; pictures with fewer than S segments end in empty masks."""
    most = max(len(c.segments) for c in conditions)
    masks = torch.zeros(len(conditions), most, height, width)
    for b, condition in enumerate(conditions):
        for s, segment in enumerate(condition.segments):
            masks[b, s] = resize_mask(segment.mask, height, width)
    return masks


def segment_strengths(conditions: list[Condition]) -> Tensor:
    """Strengths `(B, S)`, 0 where a picture has no such segment."""
    most = max(len(c.segments) for c in conditions)
    rows = [[s.strength for s in c.segments] for c in conditions]
    return torch.tensor([row + [0.0] * (most - len(row)) for row in rows]).reshape(-1, most)


def require_segments(conditions: list[Condition], who: str) -> None:
    """Raises ValueError unless every picture has a segment."""
    if not all(condition.segments for condition in conditions):
        raise ValueError(
            f"{who} needs segments: give --segment PHRASE=MASK.png, --segment "
            "PHRASE=left,top,right,bottom or --layout layout.json"
        )
