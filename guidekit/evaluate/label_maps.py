"""Label maps as data sets have them: what is where in an image, in one numbering.

0 is unlabelled, 1 to n are the classes of the data set in its own order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from guidekit.errors import GuidekitError
from guidekit.evaluate.images import key_of
from guidekit.images import load_image, numbered
from guidekit.layouts import load_layout
from guidekit.masks import resize_mask
from guidekit.system.untrusted import file_name, read_json
from guidekit.worlds import scenes

Form = Literal["indexed", "ade20k", "cityscapes", "coco-stuff", "layout", "panoptic", "scenes"]
Protocol = Literal["all", "filtered", "few"]
UNLABELLED = 255
LARGE, FEW = 0.05, 3  # ZestGuide's protocols: share of the image, number of segments
# Cityscapes' own identifiers to its nineteen classes of training.
TRAIN = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
SIZE = 64  # of the built-in world's maps, and of layouts' without a size of their own


@dataclass(frozen=True)
class LabelMaps:
    """Class maps by key, and the classes' names; None where a data set's files do not say them."""

    form: str
    classes: int
    names: tuple[str, ...] | None
    _open: dict[str, Callable[[], np.ndarray]]

    @property
    def keys(self) -> list[str]:
        """Keys, numbers in their order."""
        return sorted(self._open, key=numbered)

    def map(self, key: str) -> np.ndarray:
        """The map (H, W) of an image: 0 for unlabelled, 1 to `classes`."""
        found = self._open[key]()
        if found.max(initial=0) > self.classes:
            raise GuidekitError(
                f"map {key} has the class {found.max()}, and {self.form} has {self.classes}"
            )
        return found


def read_label_maps(path: str, form: str) -> LabelMaps:
    """The maps of a data set: a folder, for panoptic its JSON file, for scenes how many.

    Raises GuidekitError for another form and for a folder without maps.
    """
    if form not in get_args(Form):
        raise GuidekitError(f"maps are one of {', '.join(get_args(Form))}, not {form!r}")
    readers = {"panoptic": _panoptic, "layout": _layouts, "scenes": _scenes}
    if form in readers:
        return readers[form](path)
    return _indexed(Path(path), form)


def chosen(wanted: np.ndarray, protocol: Protocol) -> np.ndarray | None:
    """A map under one of ZestGuide's protocols; None where the image does not take part.

    all: as it is. filtered: classes of more than 5% of the image. few: images with one to three
    of these.
    """
    if protocol == "all":
        return wanted if wanted.any() else None
    counts = np.bincount(wanted.ravel())
    large = [k for k in range(1, len(counts)) if counts[k] > LARGE * wanted.size]
    if not large or (protocol == "few" and len(large) > FEW):
        return None
    return np.where(np.isin(wanted, large), wanted, 0)


def _indexed(folder: Path, form: str) -> LabelMaps:
    """A grey or palette PNG an image."""
    endings = {"cityscapes": "_gtFine_labelIds", "coco-stuff": "_labelTrainIds"}
    classes = {"ade20k": 150, "cityscapes": 19, "coco-stuff": 182}.get(form, UNLABELLED - 1)
    files = sorted(folder.rglob("*.png")) if folder.is_dir() else []
    if form == "cityscapes":
        files = [file for file in files if file.stem.endswith("_labelIds")]
    if not files:
        raise GuidekitError(f"maps {folder}: no PNG of {form} in it")
    opened = {
        key_of(file.stem.removesuffix(endings.get(form, ""))): lambda file=file: _numbers(
            file, form
        )
        for file in files
    }
    return LabelMaps(form, classes, None, opened)


def _numbers(file: Path, form: str) -> np.ndarray:
    """The numbers of a map as classes."""
    values = load_image(file, "map", np.asarray)
    if values.ndim != 2:
        raise GuidekitError(f"map {file}: it is in colour; {form} has one number a pixel")
    values = values.astype(np.int64)
    if form == "cityscapes":
        table = np.zeros(256, np.int64)
        table[list(TRAIN)] = np.arange(1, len(TRAIN) + 1)
        return table[np.where(values < len(table), values, 0)]
    if form == "coco-stuff":  # numbers from 0
        return np.where(values == UNLABELLED, 0, values + 1)
    return np.where(values == UNLABELLED, 0, values)


def _panoptic(path: str) -> LabelMaps:
    """COCO's panoptic form: a JSON file, and beside it a folder of its name with PNG."""
    where = Path(path)
    try:
        table = read_json(where)
        categories = {row["id"]: row["name"] for row in table["categories"]}
        order = {number: i + 1 for i, number in enumerate(categories)}
        rows = {
            file_name(row["file_name"], "a map"): {
                int(segment["id"]): order[segment["category_id"]]
                for segment in row["segments_info"]
            }
            for row in table["annotations"]
        }
    except FileNotFoundError:
        raise GuidekitError(f"maps {path}: no such file") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise GuidekitError(f"maps {path}: not COCO's panoptic JSON ({error!r})") from None
    folder = where.with_suffix("")
    opened = {
        key_of(name): lambda file=folder / name, classes=classes: _of_segments(file, classes)
        for name, classes in rows.items()
    }
    return LabelMaps("panoptic", len(order), tuple(map(str, categories.values())), opened)


def _of_segments(file: Path, classes: dict[int, int]) -> np.ndarray:
    """The map of a PNG whose colours are numbers of segments: red + 256 green + 65536 blue."""
    colours = np.asarray(load_image(file, "map")).astype(np.int64)
    numbers = colours @ np.array([1, 256, 65536])
    found = np.zeros(numbers.shape, np.int64)
    for number, label in classes.items():
        found[numbers == number] = label
    return found


def _layouts(path: str) -> LabelMaps:
    """A layout.json an image; its phrases are the classes."""
    files = sorted(Path(path).glob("*.json"))
    layouts = {key_of(file.name): load_layout(file) for file in files if file.name != "run.json"}
    if not layouts:
        raise GuidekitError(f"maps {path}: no layout in JSON in it")
    names = sorted({s.phrase for layout in layouts.values() for s in layout.segments})

    def reader(segments) -> Callable[[], np.ndarray]:
        def drawn() -> np.ndarray:
            sides = [s.mask.shape for s in segments if s.box is None]
            height, width = max(sides, default=(SIZE, SIZE))
            found = np.zeros((height, width), np.int64)
            for segment in segments:
                mask = resize_mask(segment.mask, height, width).numpy() > 0.5
                found[mask] = 1 + names.index(segment.phrase)
            return found

        return drawn

    opened = {key: reader(layout.segments) for key, layout in layouts.items()}
    return LabelMaps("layout", len(names), tuple(names), opened)


def held_out(n: int, first: int = 0) -> list[scenes.Scene]:
    """Scenes `first` to `first + n` of the built-in test split, by their number of objects."""
    plans = [scenes.scene(i, "test") for i in range(first, first + n)]
    # Neighbours share a batch, and regions of a batch are padded to the most of it.
    plans.sort(key=lambda plan: len(plan.things))
    return plans


def _scenes(count: str) -> LabelMaps:
    """The built-in world: the first held-out scenes, in the order of benchmarks/layout.py."""
    if not count.isdecimal() or int(count) < 1:
        raise GuidekitError(f"scenes are a number of held-out scenes, such as 500, not {count!r}")
    plans = held_out(int(count))
    opened = {str(i): lambda plan=plan: scenes.labels(plan, SIZE) for i, plan in enumerate(plans)}
    return LabelMaps("scenes", len(scenes.CLASSES), tuple(scenes.CLASSES), opened)
