"""Labelled images as people have them: class folders, masks by stem, tables of labels.

    shots/cat/1.png shots/dog/2.png            a folder per class
    shots/positive/... shots/negative/...      an attribute and its absence
    shots/images/1.png shots/masks/1.png       indexed masks by stem; 255 is unlabelled
    shots/metadata.jsonl or shots/labels.csv   a column file_name, and the labels

A table's column `label` holds one class, or several joined by semicolons or as a list; without it
every column of zeros and ones is a label of its own. A CSV is separated by commas, semicolons or
tabs. Numbers in names count as numbers. Images are read when they are needed, as `images` says.
"""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.images import fitted, load_image, middle, numbered, to_uint8
from guidekit.masks import class_values
from guidekit.system.untrusted import inside, parse_json, read_text

KINDS = ("classes", "labels", "masks")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
TABLES = ("metadata.jsonl", "metadata.csv", "labels.csv")
UNLABELLED = 255  # value of a mask's pixels that nobody labelled
FILE_COLUMNS = ("file_name", "file", "image", "path")
READER = 2  # of images; features that were kept of another are read anew
LABEL_COLUMNS = ("label", "labels", "class")


@dataclass(frozen=True)
class Examples:
    """Images with what is known of them; `images` and `masks` are read by index.

    kind: "classes" (targets (n,) are indices), "labels" (targets (n, L) are zeros and ones) or
    "masks". images(i): (C, H, W) in [-1, 1]. masks(i): (h, w) of class indices, -1 unlabelled.
    key: what tells these examples from others, for the cache of features.
    """

    kind: str
    classes: tuple[str, ...]
    count: int
    images: Callable[[int], Tensor]
    targets: np.ndarray | None = None
    masks: Callable[[int], Tensor] | None = None
    values: tuple[int, ...] = ()  # of the classes in the files of masks
    key: str = ""

    def __len__(self) -> int:
        return self.count

    def load(self, indices: Sequence[int]) -> Tensor:
        """Some images (B, C, H, W) in [-1, 1]."""
        return torch.stack([self.images(i) for i in indices])

    @property
    def per_class(self) -> dict[str, int]:
        """Number of images that have each class; of masks, that show it."""
        if self.kind == "masks":
            seen = Counter(int(c) for i in range(self.count) for c in self.masks(i).unique())
        elif self.kind == "classes":
            seen = Counter(self.targets.tolist())
        else:
            seen = Counter(dict(enumerate(self.targets.sum(0).tolist())))
        return {name: int(seen[index]) for index, name in enumerate(self.classes)}

    @staticmethod
    def of(
        images: Tensor,
        targets: Tensor | np.ndarray,
        classes: Sequence[str],
        kind: str = "classes",
    ) -> "Examples":
        """Examples that are in memory: images (n, C, H, W) in [-1, 1] and their targets.

        targets: (n,) indices of classes, (n, L) zeros and ones, or masks (n, H, W) of indices.
        """
        targets = np.asarray(targets)
        key = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        if kind == "masks":
            masks = torch.from_numpy(targets).long()
            return Examples(
                kind,
                tuple(classes),
                len(images),
                images.__getitem__,
                masks=masks.__getitem__,
                values=tuple(range(len(classes))),
                key=key,
            )
        return Examples(kind, tuple(classes), len(images), images.__getitem__, targets, key=key)


def read_examples(path: str | Path, size: tuple[int, int], channels: int = 3) -> Examples:
    """The examples in a folder or a table, their images cropped and resized to `size` (H, W).

    Raises GuidekitError that names the file at fault: nothing there, no labels, a mask without its
    image or of another size, a file that is no image, a class with no example.
    """
    path = Path(path)
    if not path.exists():
        raise GuidekitError(f"{path} does not exist; give a folder of labelled images or a table")
    layout = _layout(path)
    examples = layout(path, size, channels)
    if len(examples.classes) < 2 and examples.kind == "classes":
        raise GuidekitError(
            f"{path} has one class only ({examples.classes[0]}); add images of another one, for "
            "an attribute a folder `negative` beside `positive`"
        )
    return examples


def _layout(path: Path) -> Callable[[Path, tuple[int, int], int], Examples]:
    """How the examples lie there."""
    if path.is_file():
        return _from_table
    if any((path / name).exists() for name in TABLES):
        return lambda folder, *rest: _from_table(
            next(folder / name for name in TABLES if (folder / name).exists()), *rest
        )
    if (path / "masks").is_dir() or (path / "images").is_dir():
        return _from_masks
    return _from_folders


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, numbers in their names counting as numbers."""
    found = (p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    return sorted(found, key=lambda path: numbered(path.name))


def _from_folders(path: Path, size: tuple[int, int], channels: int) -> Examples:
    """A folder per class; its name is the class."""
    folders = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    folders.sort(key=lambda folder: numbered(folder.name))
    if not folders:
        found = image_files(path)
        if found:
            raise GuidekitError(
                f"the {len(found)} images in {path} have no labels; put them into a folder per "
                "class, add masks/ beside images/, or add a metadata.jsonl"
            )
        raise GuidekitError(f"{path} is empty; put a folder of images per class into it")
    files, targets = [], []
    for index, folder in enumerate(folders):
        found = image_files(folder)
        if not found:
            raise GuidekitError(f"the class folder {folder} has no images; fill or remove it")
        files += found
        targets += [index] * len(found)
    names = tuple(folder.name for folder in folders)
    if set(names) == {"negative", "positive"}:
        names = ("negative", "positive")
    return _of_files("classes", names, files, np.array(targets), size, channels)


def _from_table(path: Path, size: tuple[int, int], channels: int) -> Examples:
    """A CSV or JSON-lines file with one row per image."""
    rows = _rows(path)
    column = next((c for c in FILE_COLUMNS if c in rows[0]), None)
    if column is None:
        raise GuidekitError(
            f"{path} has no column file_name, which says where each image is; it has "
            f"{', '.join(map(str, rows[0]))}"
        )
    files = [inside(path.parent, str(row[column]), f"{path}: the file") for row in rows]
    if missing := [str(f) for f in files if not f.is_file()]:
        raise GuidekitError(
            f"{path} names {len(missing)} files that do not exist, first {missing[0]}"
        )
    label = next((c for c in LABEL_COLUMNS if c in rows[0]), None)
    others = [c for c in rows[0] if c != column]
    if label is None and not others:
        raise GuidekitError(
            f"{path} has no labels; add a column `label`, or one of 0 and 1 per label"
        )
    if label is None:
        names = tuple(others)
        targets = np.array([[_zero_or_one(row[c], c, path) for c in others] for row in rows])
        return _of_files("labels", names, files, targets, size, channels)
    sets = [_several(row[label]) for row in rows]
    if empty := [str(f) for f, found in zip(files, sets, strict=True) if not found]:
        raise GuidekitError(f"{path}: {empty[0]} and {len(empty) - 1} others have no label")
    names = tuple(sorted({name for found in sets for name in found}, key=numbered))
    if all(len(found) == 1 for found in sets):
        targets = np.array([names.index(found[0]) for found in sets])
        return _of_files("classes", names, files, targets, size, channels)
    targets = np.array([[int(name in found) for name in names] for found in sets])
    return _of_files("labels", names, files, targets, size, channels)


def _rows(path: Path) -> list[dict]:
    """Rows of a table as dicts; ValueError for a file that is none or has none."""
    try:
        text = read_text(path)
        if path.suffix == ".csv":
            rows = _csv_rows(text)
        else:  # other marks that end a line, which splitlines knows, are letters in JSON
            rows = [parse_json(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise GuidekitError(f"{path} is not a readable table ({error})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise GuidekitError(
            f"{path} has no rows; give a CSV with a header or one JSON object a line"
        )
    if any(row.keys() != rows[0].keys() for row in rows):
        raise GuidekitError(f"{path}: the rows have different columns")
    return rows


def _csv_rows(text: str) -> list[dict]:
    """Rows of a CSV, whose quoted fields may hold line breaks.

    It is separated by what makes a column of FILE_COLUMNS, else by commas.
    """
    tables = [csv.DictReader(io.StringIO(text, newline=""), delimiter=d) for d in ",;\t"]
    table = next((t for t in tables if {*FILE_COLUMNS} & {*(t.fieldnames or ())}), tables[0])
    return list(table)


def _several(value: object) -> list[str]:
    """Labels of a field, with single spaces between their words."""
    parts = value if isinstance(value, list) else str(value if value is not None else "").split(";")
    labels = (" ".join(str(part).split()) for part in parts)
    return [label for label in labels if label]


def _zero_or_one(value: object, column: str, path: Path) -> int:
    known = {"0": 0, "1": 1, "-1": 0, "0.0": 0, "1.0": 1, "-1.0": 0, "false": 0, "true": 1}
    try:
        return known[str(value).strip().lower()]
    except KeyError:
        raise GuidekitError(f"{path}: column {column} holds {value!r}; labels are 0 or 1") from None


def _from_masks(path: Path, size: tuple[int, int], channels: int) -> Examples:
    """images/ and masks/ with the same stems; a mask's pixel values are class indices."""
    images, masks = path / "images", path / "masks"
    for folder in (images, masks):
        if not folder.is_dir() or not image_files(folder):
            raise GuidekitError(f"{folder} has no images; images/ and masks/ go together by stem")
    by_stem = {p.stem: p for p in image_files(masks)}
    files = image_files(images)
    stems = {f.stem for f in files}
    if lonely := sorted(stems.symmetric_difference(by_stem)):
        raise GuidekitError(
            f"{path}: {lonely[0]!r} and {len(lonely) - 1} others lack image or mask"
        )
    values = [_mask_values(by_stem[f.stem], f) for f in files]
    known = sorted({int(v) for found in values for v in np.unique(found)} - {UNLABELLED})
    if len(known) < 2:
        raise GuidekitError(
            f"the masks in {masks} hold one value only ({known}); label two classes"
        )
    names = _mask_names(path, known)

    def mask(i: int) -> Tensor:
        return class_map(read_mask(by_stem[files[i].stem]), tuple(known), size)

    examples = _of_files("masks", names, files, None, size, channels)
    return replace(examples, masks=mask, values=tuple(known))


def _mask_names(path: Path, known: list[int]) -> tuple[str, ...]:
    """Names of mask values from classes.txt, a line per value from 0 on, else the numbers."""
    table = path / "classes.txt"
    if not table.exists():
        return tuple(map(str, known))
    lines = read_text(table).splitlines()
    if max(known) >= len(lines):
        raise GuidekitError(
            f"{table} names {len(lines)} classes, the masks hold the value {known[-1]}"
        )
    return tuple(lines[v].strip() for v in known)


def read_mask(path: Path) -> np.ndarray:
    """Class values (h, w) of an indexed or grey mask, upright, of up to 32 bits.

    Raises GuidekitError for one in colour, with transparency or in fractions, and for a JPEG.
    """
    return load_image(path, "mask", _classes)


def _classes(image: Image.Image) -> np.ndarray:
    if image.format in ("JPEG", "MPO"):
        raise GuidekitError("it is a JPEG, which changes the values; save it as an indexed PNG")
    values = class_values(image)
    if values is None:
        raise GuidekitError(f"it is in colour ({image.mode}); save it as an indexed PNG")
    return values


def _mask_values(path: Path, picture: Path) -> np.ndarray:
    """Values of the mask of an image; GuidekitError for one of another size."""
    values = read_mask(path)
    height, width = values.shape
    shown = load_image(picture).size
    if shown != (width, height):
        raise GuidekitError(
            f"{path} has {width}x{height} pixels, its image {shown[0]}x{shown[1]}; they must be "
            "the same"
        )
    return values


def _of_files(
    kind: str,
    classes: tuple[str, ...],
    files: list[Path],
    targets: np.ndarray | None,
    size: tuple[int, int],
    channels: int,
) -> Examples:
    """Examples whose images are read from files when they are needed."""
    for file in files:
        load_image(file)
    key = repr([(str(f.resolve()), f.stat().st_mtime_ns, f.stat().st_size) for f in files])
    return Examples(
        kind,
        classes,
        len(files),
        lambda i: _read(files[i], size, channels),
        targets,
        key=f"{key} {size} {channels} {READER}",
    )


def _read(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    """An image (channels, H, W) in [-1, 1], its middle cut out and resized to `size`."""
    (image,) = fitted(load_image(path), size)
    values = to_uint8(image.convert("L").convert("RGB") if channels == 1 else image)
    return values[:channels].float() / 127.5 - 1


def class_map(found: np.ndarray, values: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Class indices (H, W) of a mask's values, -1 for others, cut and resized like its image."""
    mask = np.full(found.shape, -1, np.int64)
    for index, value in enumerate(values):
        mask[found == value] = index
    left, top, right, bottom = middle(mask.shape[::-1], size)
    rows = top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]
    columns = left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]
    return torch.from_numpy(mask[rows.astype(int)[:, None], columns.astype(int)])


def soft_masks(masks: Tensor, classes: int, grid: tuple[int, int]) -> Tensor:
    """Share of every class (B, classes, h, w) in each cell of a grid, for masks (B, H, W).

    Unlabelled pixels (-1) count for no class; a cell of nothing else is all zero. At the masks' own
    size it is one-hot.
    """
    one_hot = F.one_hot(masks.clamp(min=0), classes).movedim(-1, 1).float()
    one_hot = one_hot * (masks >= 0)[:, None]
    return F.interpolate(one_hot, grid, mode="area")
