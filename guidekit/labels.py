"""Label sets and label maps: which classes there are, and where each of them is in an image.

A label map is only ever resized by nearest neighbour, because every other way makes pixels of third
classes at the edges.
"""

import json
from collections import Counter
from collections.abc import Iterable
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
from guidekit.images import replacing
from guidekit.system.untrusted import printable, read_object

SETS = Path(__file__).with_name("label_sets")
LABELS = "labels.json"  # a label set beside a model's weights
FORMAT = 1
VOID = -1  # in a LabelMap: a pixel that nobody labelled
KEYS = ("format", "name", "classes", "palette", "things", "first", "void", "category_ids")
LISTED = 12  # values or names in a message
MOST_CLASSES = 10_000

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelSet:
    """The classes that a label map can hold.

    classes: their names, each once. palette: a colour for each, or none at all. things: names of
    the countable ones, the others are stuff; None where nobody said which is which. first: the
    number of the first class in indexed files. void: numbers in indexed files of pixels that nobody
    labelled. category_ids: COCO's id of each, which may leave numbers out; empty where they count
    from 1. Raises GuidekitError that says what is wrong.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...] = ()
    things: tuple[str, ...] | None = None
    first: int = 0
    void: tuple[int, ...] = (255,)
    category_ids: tuple[int, ...] = ()

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
        if self.category_ids and len({*self.category_ids}) != len(self.classes):
            raise GuidekitError(
                f"{where} has {len({*self.category_ids})} ids of categories for "
                f"{len(self.classes)} classes; give one of its own for each, or none"
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
        raise GuidekitError(f"label set {self.name!r} has no class {name!r}; it has {listed(near)}")

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
            "category_ids": list(self.category_ids),
        }

    def save(self, path: Path) -> None:
        """Writes the set as a JSON file."""
        with replacing(path) as part:
            part.write_text(json.dumps(self.table(), indent=1) + "\n", encoding="utf-8")


def void_numbers(count: int) -> tuple[int, ...]:
    """Void in indexed files of a set that says nothing of it: 255, 65535 where that is a class."""
    return (255,) if count <= 255 else (65535,)


def label_sets() -> list[str]:
    """Names of the sets that come with guidekit."""
    return sorted(path.stem for path in SETS.glob("*.json"))


def load_label_set(name: str | Path) -> LabelSet:
    """A set by its name, or of a JSON file. Raises GuidekitError that says what exists.

    The file holds `{"classes": ["sky", ...]}` and, if they are known, `name`, `palette` (colours
    such as "#ff0000"), `things` (names), `first`, `void` and `category_ids`, or COCO's
    `categories`.
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
    classes = _texts(table.get("classes"), f"{where}: `classes`")
    first = _whole(table.get("first", 0), f"{where}: `first`")
    void = list(void_numbers(first + len(classes)))
    return LabelSet(
        _text(table.get("name", name), f"{where}: `name`"),
        classes,
        tuple(_colour(c, where) for c in _list(table.get("palette", []), f"{where}: `palette`")),
        None if things is None else _texts(things, f"{where}: `things`"),
        first,
        _wholes(table.get("void", void), f"{where}: `void`"),
        _wholes(table.get("category_ids", []), f"{where}: `category_ids`"),
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
        void=void_numbers(len(names)),
        category_ids=_wholes([row["id"] for row in rows if "id" in row], f"{where}: `id`"),
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


def _wholes(value: Any, where: str) -> tuple[int, ...]:
    return tuple(_whole(one, where) for one in _list(value, where))


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

    ids: `(H, W)`, indices in `labels.classes`, VOID where nobody labelled; a tensor or an array of
    whole numbers of any width, kept as int64. Raises GuidekitError for other numbers, which it
    names.
    """

    ids: Tensor
    labels: LabelSet

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Tensor | np.ndarray):
            raise GuidekitError(
                f"a label map is a tensor or array (H, W) of indices, not {type(self.ids).__name__}"
            )
        ids = self.ids
        if isinstance(ids, np.ndarray) and ids.dtype.kind in "iub":
            ids = torch.from_numpy(ids.astype(np.int64))  # a copy, whatever its strides and bytes
        other = not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex()
        if other or ids.ndim != 2 or not ids.numel():
            raise GuidekitError(
                f"a label map is (H, W) of whole numbers, not {tuple(ids.shape)} of {ids.dtype}"
            )
        object.__setattr__(self, "ids", ids.long())
        if wrong := [v for v in self.present if not VOID <= v < len(self.labels)]:
            raise GuidekitError(
                f"the label map holds {listed(wrong)}; label set {self.labels.name!r} has the "
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


def check_labels(given: LabelMap, labels: LabelSet, reader: str) -> None:
    """Raises GuidekitError for a map of other classes than those that, say, "the control reads"."""
    if given.labels.classes != labels.classes:
        raise GuidekitError(
            f"the map is of label set {given.labels.name!r} with {len(given.labels)} classes "
            f"({listed(given.labels.classes, 3)}), and {reader} {labels.name!r} with "
            f"{len(labels)} ({listed(labels.classes, 3)}); give a map of that set, or an affinity "
            "that leads to it (--affinity), and none where the map is of that set already"
        )


def listed(values: Iterable[Any], most: int = LISTED) -> str:
    """The first of the values, as a message says them, and how many more there are."""
    found = list(map(str, values))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
