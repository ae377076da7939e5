"""Rows of a table: images of a folder each, their numbers as columns, and differences of rows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from guidekit.errors import GuidekitError
from guidekit.evaluate.images import ImageSet, prompts_of, read_images
from guidekit.evaluate.intervals import interval
from guidekit.evaluate.judges import Extractor, Judge
from guidekit.evaluate.results import Results
from guidekit.images import to_image
from guidekit.worlds import scenes

BATCH = 16  # images that are read at a time
UNGUIDED, REAL, REAL_SCENES = " unguided", "real images", "real scenes"
NO_UNGUIDED = "There is no row of unguided images; runs keep them, or give their folder too."
NO_REAL = "There is no row of real images, the judge's own ceiling; give --real."

#: Numbers of prompts or images by their keys, of every row, of every column.
Columns = Mapping[str, Mapping[str, Mapping[str, float]]]


def real_scenes(plans: list[scenes.Scene], size: int = 64) -> ImageSet:
    """Scenes of the built-in world as images."""

    def opened(plan: scenes.Scene) -> Image:
        return to_image((scenes.batch([plan], size)[0][0] + 1) / 2)

    return ImageSet(REAL_SCENES, {str(i): lambda p=plan: opened(p) for i, plan in enumerate(plans)})


def rows_of(folders: Sequence[Path]) -> list[ImageSet]:
    """The folders' images, and the unguided ones that runs keep beside them."""
    return [images for images, _ in _with_folders(folders)]


def _with_folders(folders: Sequence[Path]) -> list[tuple[ImageSet, Path]]:
    """The rows, each with the folder that it was named by."""
    sets = []
    for folder in folders:
        sets.append((read_images(folder), folder))
        if (folder / "unguided").is_dir():
            unguided = read_images(folder / "unguided")
            sets.append((ImageSet(f"{folder.name}{UNGUIDED}", unguided.openers), folder))
    names = [images.name for images, _ in sets]
    if taken := {REAL, REAL_SCENES} & {*names}:
        raise GuidekitError(f"{min(taken)!r} is the name of another row; rename that folder")
    if doubled := [name for name in names if names.count(name) > 1]:
        raise GuidekitError(f"two folders are called {doubled[0]!r}; rename one")
    return sets


def lacking(sets: Sequence[ImageSet], real: bool) -> list[str]:
    """What is said of a table with one row of drawn images, or without one of real images."""
    drawn = [images for images in sets if images.name not in (REAL, REAL_SCENES)]
    return [NO_UNGUIDED] * (len(drawn) < 2) + [NO_REAL] * (not real)


def real_images(folder: Path) -> ImageSet:
    """Images of a folder as the row of real ones."""
    return ImageSet(REAL, read_images(folder).openers)


def check_paired(rows: Sequence[object], paired: bool) -> None:
    """Raises GuidekitError for differences of a single row, before anything is measured."""
    if paired and len(rows) < 2:
        raise GuidekitError("--paired compares the first row to others; give another FOLDER")


def common_keys(sets: Sequence[ImageSet], keys: Sequence[str], result: Results) -> list[str]:
    """The keys that all rows have, so that all have the same number of the same images."""
    have = [set(images.keys) for images in sets]
    common = [key for key in keys if all(key in own for own in have)]
    if not common:
        raise GuidekitError(
            f"{', '.join(i.name for i in sets)} have no image that is called as one of the maps or "
            f"true images, such as {keys[0]!r}"
        )
    left = len(keys) - len(common)
    if left:
        result.notes.append(f"{left} of {len(keys)} are left out, as a row has no image of them.")
    return common


def prompted(
    folders: Sequence[Path], paired: bool, real: Path | None = None
) -> list[tuple[ImageSet, dict[str, str]]]:
    """The rows with the prompts of their images, those of a run also for its unguided ones.

    The last is that of real images, where their folder is given. Raises GuidekitError for a single
    row, where it is to be compared.
    """
    texts = {folder: prompts_of(folder) for folder in folders}
    rows = [(images, texts[folder]) for images, folder in _with_folders(folders)]
    check_paired(rows, paired)
    return rows if real is None else [*rows, (real_images(real), prompts_of(real))]


def features_of(images: ImageSet, extractor: Extractor, n: int | None = None) -> np.ndarray:
    """Features of the first n images, or of all."""
    return np.concatenate(list(shards(images, extractor, n)))


def shards(images: ImageSet, extractor: Extractor, n: int | None) -> Iterator[np.ndarray]:
    """Features of the first n images, some at a time."""
    for part in images.batches(BATCH, images.keys[:n]):
        yield np.concatenate([extractor.read([image]) for image in part])


def named(judge: Judge) -> dict[str, Any]:
    """What a result says about a judge."""
    return {"name": judge.name, "sha256": sorted(judge.hashes)}


def mean_column(name: str, values: np.ndarray) -> dict[str, object]:
    """A column: the mean of numbers of images or prompts, and its interval."""
    bounds = interval(lambda i: float(values[i].mean()), len(values))
    return {name: float(values.mean()), f"{name} 95%": bounds}


def compared(keys: Mapping[str, Iterable[str]], unit: str) -> Iterator[tuple[str, str, list[str]]]:
    """The first row's name, each other's, and the keys that both have.

    Raises GuidekitError where they have nothing in common.
    """
    first, *others = keys
    for other in others:
        have = set(keys[other])
        if not (common := [key for key in keys[first] if key in have]):
            raise GuidekitError(f"{first} and {other} have no {unit} in common, so no differences")
        yield first, other, common


def differences(columns: Columns, unit: str) -> Iterator[dict[str, object]]:
    """Rows of the first row's numbers minus each other's, of what both have; not of real images."""
    keys = {name: own for name, own in next(iter(columns.values())).items() if name != REAL}
    for first, other, common in compared(keys, unit):
        row: dict[str, object] = {"images": f"{first} - {other}", unit: len(common)}
        for name, found in columns.items():
            gaps = [found[first][key] - found[other][key] for key in common]
            row |= mean_column(name, np.array(gaps))
        yield row
