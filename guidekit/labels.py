"""Label sets and label maps: which classes there are, and where each of them is in an image.

A label map is read from what people have: an indexed or grey PNG of class numbers, a PNG in the
colours of a palette, or COCO's panoptic pair of PNG and JSON. It is only ever resized by nearest
neighbour, because every other way makes pixels of third classes at the edges.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.images import as_rgb, is_deep, load_image, replacing
from guidekit.masks import class_values
from guidekit.system.untrusted import printable, read_object, read_text

SETS = Path(__file__).with_name("label_sets")
FORMAT = 1
VOID = -1  # in a LabelMap: a pixel that nobody labelled
KEYS = ("format", "name", "classes", "palette", "things", "first", "void")
LISTED = 12  # values, colours or names in a message
MOST_CLASSES = 10_000

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelSet:
    """The classes that a label map can hold.

    classes: their names, each once. palette: a colour for each, or none at all. things: names of
    the countable ones, the others are stuff; None where nobody said which is which. first: the
    number of the first class in indexed files. void: numbers in indexed files of pixels that nobody
    labelled. Raises GuidekitError that says what is wrong.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...] = ()
    things: tuple[str, ...] | None = None
    first: int = 0
    void: tuple[int, ...] = (255,)

    def __post_init__(self) -> None:
        where = f"label set {self.name!r}"
        if not 1 <= len(self.classes) <= MOST_CLASSES:
            raise GuidekitError(f"{where} has {len(self.classes)} classes; 1 to {MOST_CLASSES} go")
        if twice := sorted(c for c, times in Counter(self.classes).items() if times > 1):
            raise GuidekitError(f"{where} names {', '.join(twice[:LISTED])} twice; name each once")
        numbers = range(self.first, self.first + len(self.classes))
        if clash := [number for number in self.void if number in numbers]:
            raise GuidekitError(
                f"{where}: {clash[0]} is a class and void; give `void` numbers outside of "
                f"{numbers.start} to {numbers.stop - 1}, or none: []"
            )
        if self.palette and len(self.palette) != len(self.classes):
            raise GuidekitError(
                f"{where} has {len(self.palette)} colours for {len(self.classes)} classes; give "
                "one for each, or none"
            )
        if unknown := [t for t in self.things or () if t not in self.classes]:
            raise GuidekitError(f"{where}: {unknown[0]!r} of its things is no class of it")

    def __len__(self) -> int:
        return len(self.classes)

    def index(self, name: str) -> int:
        """The index of a class. Raises GuidekitError that names similar ones."""
        if name in self.classes:
            return self.classes.index(name)
        near = [c for c in self.classes if name and (name in c or c in name)] or self.classes
        raise GuidekitError(f"label set {self.name!r} has no class {name!r}; it has {_some(near)}")

    @property
    def is_thing(self) -> Tensor | None:
        """Whether each class is countable (N,), None where the set does not say."""
        return (
            None if self.things is None else torch.tensor([c in self.things for c in self.classes])
        )

    @cached_property
    def colours(self) -> Tensor:
        """The palette (3, N) in [0, 1]. Raises GuidekitError for a set without one."""
        if not self.palette:
            raise GuidekitError(f"label set {self.name!r} has no palette; add one to its JSON")
        return torch.tensor(self.palette, dtype=torch.float64).T / 255

    def numbers(self) -> np.ndarray:
        """The classes' numbers (N,) in indexed files."""
        return np.arange(self.first, self.first + len(self))

    def table(self) -> dict[str, Any]:
        """The set as JSON has it."""
        return {
            "format": FORMAT,
            "name": self.name,
            "classes": list(self.classes),
            "palette": ["#" + bytes(colour).hex() for colour in self.palette],
            "things": None if self.things is None else list(self.things),
            "first": self.first,
            "void": list(self.void),
        }

    def save(self, path: Path) -> None:
        """Writes the set as a JSON file."""
        with replacing(path) as part:
            part.write_text(json.dumps(self.table(), indent=1) + "\n", encoding="utf-8")


def label_sets() -> list[str]:
    """Names of the sets that come with guidekit."""
    return sorted(path.stem for path in SETS.glob("*.json"))


def load_label_set(name: str | Path) -> LabelSet:
    """A set by its name, or of a JSON file. Raises GuidekitError that says what exists.

    The file holds `{"classes": ["sky", ...]}` and, if they are known, `name`, `palette` (colours
    such as "#ff0000"), `things` (names), `first` and `void`, or COCO's `categories`.
    """
    path = SETS / f"{name}.json" if str(name) in label_sets() else Path(name)
    if not path.exists():
        there = ", ".join(label_sets())
        raise GuidekitError(f"no label set {str(name)!r}; give a JSON file, or one of {there}")
    return parse_label_set(read_object(path), path.stem, f"label set {path}")


def parse_label_set(table: dict[str, Any], name: str, where: str) -> LabelSet:
    """A set of what its JSON holds; `name` where that says none. Raises as `load_label_set`."""
    if "categories" in table:
        return _of_categories(table["categories"], name, where)
    if unknown := [key for key in table if key not in KEYS]:
        raise GuidekitError(f"{where}: no key {unknown[0]!r}; it has {', '.join(KEYS)}")
    if table.get("format", FORMAT) != FORMAT:
        raise GuidekitError(f"{where}: this guidekit reads format {FORMAT}")
    things = table.get("things")
    return LabelSet(
        _text(table.get("name", name), f"{where}: `name`"),
        _texts(table.get("classes"), f"{where}: `classes`"),
        tuple(_colour(c, where) for c in _list(table.get("palette", []), f"{where}: `palette`")),
        None if things is None else _texts(things, f"{where}: `things`"),
        _whole(table.get("first", 0), f"{where}: `first`"),
        tuple(_whole(v, f"{where}: `void`") for v in _list(table.get("void", [255]), where)),
    )


def _of_categories(categories: Any, name: str, where: str) -> LabelSet:
    """The set of COCO's categories, in their order; numbers in indexed files are the order's."""
    rows = _list(categories, f"{where}: `categories`")
    if not all(isinstance(row, dict) and "name" in row for row in rows):
        raise GuidekitError(f"{where}: every category has a `name`")
    names = _texts([row["name"] for row in rows], f"{where}: `categories`")
    colours = [row["color"] for row in rows if "color" in row]
    kinds = [row["isthing"] for row in rows if "isthing" in row]
    things = tuple(n for n, row in zip(names, rows, strict=True) if row.get("isthing"))
    return LabelSet(
        name,
        names,
        tuple(_colour(c, where) for c in colours),
        things if len(kinds) == len(rows) else None,
    )


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise GuidekitError(f"{where} must be a list")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or printable(value) != value:
        raise GuidekitError(f"{where} must be a text, not {value!r}")
    return value.strip()


def _texts(value: Any, where: str) -> tuple[str, ...]:
    return tuple(_text(one, where) for one in _list(value, where))


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise GuidekitError(f"{where} must be a whole number of at least 0, not {value!r}")
    return value


def _colour(value: Any, where: str) -> Colour:
    """Red, green and blue of a text such as #ff0000, or of three numbers."""
    if isinstance(value, list) and len(value) == 3:
        found = tuple(_whole(v, f"{where}: a colour") for v in value)
    else:
        try:
            found = ImageColor.getrgb(value)[:3]
        except (ValueError, AttributeError, TypeError):
            found = (256, 0, 0)
    if max(found) > 255:
        raise GuidekitError(f"{where}: {value!r} is no colour such as #ff0000")
    return found[0], found[1], found[2]


@dataclass(frozen=True, eq=False)
class LabelMap:
    """The class of every pixel of an image.

    ids: `(H, W)`, indices in `labels.classes`, VOID where nobody labelled. Raises GuidekitError for
    other numbers, which it names.
    """

    ids: Tensor
    labels: LabelSet

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or not self.ids.numel() or self.ids.is_floating_point():
            raise GuidekitError(
                f"a label map is (H, W) of whole numbers, not {tuple(self.ids.shape)} of "
                f"{self.ids.dtype}"
            )
        if wrong := [v for v in self.present if not VOID <= v < len(self.labels)]:
            raise GuidekitError(
                f"the label map holds {_some(wrong)}; label set {self.labels.name!r} has the "
                f"indices 0 to {len(self.labels) - 1}, and {VOID} for void"
            )

    @cached_property
    def present(self) -> list[int]:
        """The indices that occur, VOID included."""
        return self.ids.unique().tolist()

    def resized(self, height: int, width: int) -> "LabelMap":
        """The map at another size, by nearest neighbour."""
        ids = F.interpolate(self.ids[None, None].double(), (height, width), mode="nearest-exact")
        return LabelMap(ids[0, 0].long(), self.labels)

    def one_hot(self) -> Tensor:
        """`(N, H, W)` of zeros and ones; all zero where void."""
        ids = self.ids.clamp(min=0)
        found = F.one_hot(ids.long(), len(self.labels)).movedim(-1, 0).float()
        return found * (self.ids != VOID)

    def coloured(self) -> Image.Image:
        """The map in the colours of the set's palette; void is black."""
        colours = torch.cat([torch.zeros(3, 1), self.labels.colours * 255], 1).round().byte()
        return Image.fromarray(colours.T[self.ids.long() + 1].numpy())

    def indexed(self) -> Image.Image:
        """The map as an image of class numbers, with the set's palette where it fits in 8 bits.

        Raises GuidekitError for void pixels of a set that has no number for them.
        """
        if VOID in self.present and not self.labels.void:
            raise GuidekitError(
                f"the label map has void pixels, and label set {self.labels.name!r} has no number "
                "for them; add `void` to its JSON"
            )
        void = self.labels.void[0] if self.labels.void else 0
        numbers = np.append(self.labels.numbers(), void)[self.ids.numpy()]
        if max(numbers.max(), void) > 255:
            return Image.fromarray(numbers.astype(np.uint16))
        image = Image.fromarray(numbers.astype(np.uint8), "L")
        if self.labels.palette:
            shown = np.zeros((256, 3), np.uint8)
            count = min(len(self.labels), 256 - self.labels.first)
            shown[self.labels.numbers()[:count]] = self.labels.palette[:count]
            image.putpalette(shown.tobytes())
        return image


def read_label_map(path: str | Path, labels: LabelSet) -> LabelMap:
    """The label map in a file: class numbers, colours of the set's palette, or COCO's panoptic PNG.

    A PNG in colour beside a JSON of the same name that holds `segments_info` is a panoptic one. An
    image of numbers, or with a palette of its own, is read by number; where all of its colours are
    the set's, by colour. Raises GuidekitError that names the values or colours that the set has
    not, and for a JPEG, which changes them.
    """
    beside = Path(path).with_suffix(".json")
    if beside.is_file() and "segments_info" in read_text(beside):
        return read_panoptic(path, beside, labels)
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
                f"{_pixels(sum(unknown.values()))} of its pixels have colours that label set "
                f"{labels.name!r} has not ({_some(unknown)}); give the set whose palette it is in"
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
        beside = f", void {_some(labels.void)}" if labels.void else ""
        raise GuidekitError(
            f"{_pixels(outside.mean())} of its pixels hold {_some(np.unique(numbers[outside]))}; "
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


def read_panoptic(path: str | Path, table: str | Path, labels: LabelSet) -> LabelMap:
    """COCO's panoptic format: a PNG of segment numbers, and a JSON that says what each one is.

    table: the JSON of this image (`segments_info`), or of a whole data set (`annotations`), with or
    without `categories`; without them `category_id` counts the set's classes from 1. Pixels of no
    segment are void. Raises GuidekitError that names a segment or a category without meaning.
    """
    where = f"panoptic {table}"
    try:
        known = _segment_classes(read_object(Path(table)), Path(path).name, labels, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise GuidekitError(f"{where} is not in COCO's form ({error!r})") from None
    colours = load_image(path, "panoptic map", lambda image: np.asarray(as_rgb(image)))
    red, green, blue = np.moveaxis(colours.astype(np.int64), -1, 0)
    values, place = np.unique(red + (green << 8) + (blue << 16), return_inverse=True)
    if lost := [v for v in values.tolist() if v not in known]:
        raise GuidekitError(f"{where} says nothing of the segments {_some(lost)} of {path}")
    ids = np.array([known[v] for v in values.tolist()])[place].reshape(red.shape)
    return LabelMap(torch.from_numpy(ids), labels)


def _segment_classes(
    table: dict[str, Any], name: str, labels: LabelSet, where: str
) -> dict[int, int]:
    """Class indices of an image's segments by their numbers; 0 is void."""
    rows = table.get("annotations", [table])
    own = [r for r in rows if r.get("file_name", name) == name and "segments_info" in r]
    if len(own) != 1:
        raise GuidekitError(f"{where} has no `segments_info` of {name}; give the JSON beside it")
    names = {c["id"]: c["name"] for c in table.get("categories", [])} or dict(
        enumerate(labels.classes, 1)
    )
    known = {0: VOID}
    for row in own[0]["segments_info"]:
        if row["category_id"] not in names:
            raise GuidekitError(f"{where} does not say what category {row['category_id']!r} is")
        known[row["id"]] = labels.index(names[row["category_id"]])
    return known


def _some(values: Sequence[Any] | Any) -> str:
    listed = list(values)
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return ", ".join(map(str, listed[:LISTED])) + more


def _pixels(share: float) -> str:
    return f"{share:.2%}"
