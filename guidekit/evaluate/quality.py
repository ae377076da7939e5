"""`guidekit eval quality`: how near a set of images lies to real ones."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from guidekit.errors import GuidekitError
from guidekit.evaluate.frechet import of_gaussians
from guidekit.evaluate.images import read_images
from guidekit.evaluate.intervals import difference, interval
from guidekit.evaluate.judges import Extractor, check_never_guided, load_extractor
from guidekit.evaluate.kernel_distance import kernel_distance
from guidekit.evaluate.precision_recall import covered
from guidekit.evaluate.results import Results
from guidekit.evaluate.rows import (
    NO_UNGUIDED,
    check_paired,
    compared,
    features_of,
    lacking,
    mean_column,
    named,
    real_scenes,
    rows_of,
)
from guidekit.evaluate.statistics import (
    ENDING,
    Statistics,
    read_moments,
    read_statistics,
    statistics,
)
from guidekit.worlds import scenes

SPLITS = 10  # of the kernel distance's interval
SMALLEST = "Rows have the first {:,} images, as many as the smallest."
REFERENCE = 2000  # real scenes for distances, from number 100,000 on


def quality(
    folders: Sequence[Path],
    real: str,
    features: str,
    draws: int = 100,
    neighbours: int = 3,
    paired: bool = False,
) -> Results:
    """Frechet and kernel distance, precision and recall, of equal numbers of images.

    real: a folder, `scenes`, or an .npz of `mu` and `sigma`, for which there is no other distance;
    then the folders may be such files too.
    """
    extractor = load_extractor(features)
    check_never_guided(extractor, folders)
    result = Results("quality", judge=named(extractor), draws=draws)
    if real.endswith(ENDING):
        if paired:
            raise GuidekitError("--paired needs real images; give --real their folder")
        _to_statistics(folders, read_statistics(Path(real)), extractor, result)
        return result
    if kept := [folder for folder in folders if folder.suffix == ENDING]:
        raise GuidekitError(
            f"{kept[0]} has statistics, which are compared to statistics; make those of "
            "real images by guidekit eval statistics FOLDER --out real.npz"
        )
    sets = rows_of(folders)
    check_paired(sets, paired)
    result.notes += lacking(sets, real=True)  # its row is one half against the other
    n = min(map(len, sets))
    if n < max(map(len, sets)):
        result.notes.append(SMALLEST.format(n))
    reference = Reference(_real_features(real, extractor), draws, neighbours)
    found = {images.name: features_of(images, extractor, n) for images in sets}
    result.rows += [{"images": name, **reference.row(made)} for name, made in found.items()]
    result.rows += reference.ceiling()
    if paired:
        keys = {images.name: images.keys[:n] for images in sets}
        for first, other, common in compared(keys, "n"):
            a, b = (found[s][[keys[s].index(key) for key in common]] for s in (first, other))
            result.rows.append({"images": f"{first} - {other}"} | reference.against(a, b))
    return result


def _real_features(real: str, extractor: Extractor) -> np.ndarray:
    plans = [scenes.scene(100_000 + i, "test") for i in range(REFERENCE)]
    images = real_scenes(plans) if real == "scenes" else read_images(Path(real))
    return features_of(images, extractor)


class Reference:
    """Features (m, d) of real images, to which others are compared."""

    def __init__(self, features: np.ndarray, draws: int, neighbours: int):
        self.features, self.draws, self.neighbours = features, draws, neighbours
        self._gaussian = features.mean(0), np.cov(features, rowvar=False)

    def row(self, made: np.ndarray) -> dict[str, object]:
        """The numbers of features (n, d).

        Intervals: of the Frechet distance a bootstrap's over images, of the kernel distance that
        of splits, of precision over images and of recall over real ones.
        """
        everything = np.arange(len(made))
        row = self._about(len(made)) | {"Frechet": self._frechet(made)}
        if self.draws:
            row["Frechet 95%"] = interval(lambda i: self._frechet(made[i]), len(made), self.draws)
        row |= _split_column(lambda i: kernel_distance(made[i], self.features), everything)
        for name, inside in self._inside(made).items():
            row |= mean_column(name, inside)
        return row

    def against(self, a: np.ndarray, b: np.ndarray) -> dict[str, object]:
        """The numbers of features (n, d) minus those of others of the same prompts and seeds."""
        row, draws = self._about(len(a)), self.draws
        both = (lambda i: self._frechet(a[i])), (lambda i: self._frechet(b[i]))
        row["Frechet"] = self._frechet(a) - self._frechet(b)
        if draws:
            row["Frechet 95%"] = difference(*both, len(a), draws)[1]

        def kernels(i: np.ndarray) -> float:
            return kernel_distance(a[i], self.features) - kernel_distance(b[i], self.features)

        row |= _split_column(kernels, np.arange(len(a)))
        theirs = self._inside(b)
        for name, inside in self._inside(a).items():
            row |= mean_column(name, inside - theirs[name])
        return row

    def ceiling(self) -> list[dict[str, object]]:
        """A row of one half of the real images against the other, where they are enough."""
        half = len(self.features) // 2
        if half <= self.neighbours + 1:
            return []
        other = Reference(self.features[half:], self.draws, self.neighbours)
        return [{"images": "real against real", **other.row(self.features[:half])}]

    def _about(self, n: int) -> dict[str, object]:
        return {"n": n, "n real": len(self.features)}

    def _frechet(self, made: np.ndarray) -> float:
        return of_gaussians(made.mean(0), np.cov(made, rowvar=False), *self._gaussian)

    def _inside(self, made: np.ndarray) -> dict[str, np.ndarray]:
        """Which images lie among real ones, and which real ones are met; none of too few."""
        if min(len(made), len(self.features)) <= self.neighbours:
            return {}
        a, b = torch.from_numpy(made), torch.from_numpy(self.features)
        found = {
            "precision": covered(a, b, self.neighbours),
            "recall": covered(b, a, self.neighbours),
        }
        return {name: inside.double().numpy() for name, inside in found.items()}


def _split_column(kernel: Callable[[np.ndarray], float], indices: np.ndarray) -> dict[str, object]:
    """The kernel distance, with an interval by splits: it is not one of a resample's doubles."""
    row: dict[str, object] = {"kernel": (value := kernel(indices))}
    parts = [kernel(part) for part in np.array_split(indices, SPLITS) if len(part) > 1]
    if len(parts) == SPLITS:
        error = 1.96 * float(np.std(parts, ddof=1)) / SPLITS**0.5
        row["kernel 95%"] = (value - error, value + error)
    return row


def _to_statistics(
    folders: Sequence[Path], real: Statistics, extractor: Extractor, result: Results
) -> None:
    """Adds a row for each folder and each file of statistics: the Frechet distance to others.

    Raises GuidekitError where files say other numbers of images than each other, or larger ones
    than a folder has.
    """
    rows = [read_statistics(folder) for folder in folders if folder.suffix == ENDING]
    sets = rows_of([folder for folder in folders if folder.suffix != ENDING])
    for found in (real, *rows):
        found.check(extractor)
    for images in sets[:1]:  # before all of them are read
        real.check_width(extractor.read([images.image(images.keys[0])]).shape[1], extractor.name)
    sizes = {found.counted() for found in rows} or {min(map(len, sets))}
    n = min(sizes)
    if len(sizes) > 1 or any(len(images) < n for images in sets):
        raise GuidekitError(
            "rows have equal numbers of images, and statistics cannot be cut; here they have "
            + ", ".join(f"{size:,}" for size in (*(row.counted() for row in rows), *map(len, sets)))
        )
    if len(rows) + len(sets) < 2:
        result.notes.append(NO_UNGUIDED)
    if any(len(images) > n for images in sets):
        result.notes.append(SMALLEST.format(n))
    rows += [statistics(i.name, read_moments(i, n, extractor), extractor) for i in sets]
    result.rows += [{"images": row.name, "n": n, "Frechet": row.to(real)} for row in rows]
