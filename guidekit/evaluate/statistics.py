"""Sums of features in an .npz: of a shard on the machine that drew it, and added up of all shards.

Beside `mu` and `sigma`, as pytorch-fid and others call mean and covariance, a file has `n` and the
SHA-256 of the extractor's weights, so that only what belongs together is added.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from guidekit.errors import GuidekitError
from guidekit.evaluate.frechet import Moments, of_gaussians
from guidekit.evaluate.images import ImageSet, read_images
from guidekit.evaluate.judges import Extractor, check_never_guided, load_extractor
from guidekit.evaluate.results import Results
from guidekit.evaluate.rows import named, shards

ENDING = ".npz"
# What numpy meets in a file that is none, is cut off, or claims to be larger than the memory.
DAMAGED = (OSError, ValueError, TypeError, LookupError, EOFError, MemoryError)
DAMAGED += (BadZipFile, zlib.error)


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of images whose features are not kept."""

    #: What was read: a file or a folder.
    name: str
    #: (d,)
    mean: np.ndarray
    #: (d, d), unbiased.
    covariance: np.ndarray
    #: Number of images; None in files of other programs.
    n: int | None = None
    #: SHA-256 of the extractor's weights; none in files of other programs.
    hashes: frozenset[str] = frozenset()

    def check(self, extractor: Extractor) -> None:
        """Raises GuidekitError for statistics of another extractor, as far as they say."""
        if self.hashes and self.hashes != extractor.hashes:
            raise GuidekitError(f"{self.name} was read by other weights than {extractor.name}'s")

    def check_width(self, width: int, name: str) -> None:
        """Raises GuidekitError for a number of features that is another."""
        if width != len(self.mean):
            raise GuidekitError(f"{self.name} has {len(self.mean)} features, and {name} {width}")

    def to(self, other: "Statistics") -> float:
        """Frechet distance to others. Raises GuidekitError for other numbers of features."""
        self.check_width(len(other.mean), other.name)
        return of_gaussians(self.mean, self.covariance, other.mean, other.covariance)

    def counted(self) -> int:
        """Of how many images it is. Raises GuidekitError for files that do not say it."""
        if self.n is None:
            raise GuidekitError(
                f"{self.name} does not say of how many images it is; it can only be --real"
            )
        return self.n

    def moments(self) -> Moments:
        """The sums that these are of."""
        n = self.counted()
        outer = (n - 1) * self.covariance + n * np.outer(self.mean, self.mean)
        return Moments(n, n * self.mean, outer)


def read_moments(images: ImageSet, n: int | None, extractor: Extractor) -> Moments:
    """Sums of the first n images, or of all, added some images at a time."""
    moments = Moments()
    for features in shards(images, extractor, n):
        moments.add(features)
    return moments


def statistics(name: str, moments: Moments, extractor: Extractor) -> Statistics:
    """The statistics of sums. Raises GuidekitError for those of a single image."""
    if moments.n < 2:
        raise GuidekitError(f"{name} has one image; a covariance needs two")
    return Statistics(name, moments.mean, moments.covariance, moments.n, extractor.hashes)


def gathered(sources: Sequence[Path], features: str, path: Path) -> Results:
    """Writes the sums of images and of statistics files, and says what each added.

    Raises GuidekitError for statistics of another extractor and for those that say no n, before
    any image is read.
    """
    if path.suffix != ENDING:
        raise GuidekitError(f"--out {path} must end in {ENDING}")
    extractor = load_extractor(features)
    check_never_guided(extractor, sources)
    kept = {source: read_statistics(source) for source in sources if source.suffix == ENDING}
    for found in kept.values():
        found.counted()
        found.check(extractor)
    sets = {source: read_images(source) for source in sources if source not in kept}
    whole, result = Moments(), Results("statistics", judge=named(extractor))
    for source in sources:
        if source in kept:
            part = kept[source].moments()
        else:
            part = read_moments(sets[source], None, extractor)
        whole.merge(part)
        result.rows.append({"images": source.name, "n": part.n})
    write_statistics(path, statistics(path.name, whole, extractor))
    result.rows.append({"images": path.name, "n": whole.n})
    return result


def write_statistics(path: Path, found: Statistics) -> None:
    """Writes an .npz, whole or not at all."""
    half = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with half.open("wb") as file:
        hashes = np.array(sorted(found.hashes), dtype=str)
        np.savez(file, mu=found.mean, sigma=found.covariance, n=found.counted(), sha256=hashes)
    half.replace(path)


def read_statistics(path: Path) -> Statistics:
    """Those of a file. Raises GuidekitError for one that is damaged or holds something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = file["mu"].astype(float), file["sigma"].astype(float)
            n = int(file["n"]) if "n" in file else None
            hashes = frozenset(map(str, file["sha256"])) if "sha256" in file else frozenset()
    except DAMAGED as error:
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise GuidekitError(f"{path} is no .npz with mu and sigma{why}") from None
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise GuidekitError(f"{path}: sigma {covariance.shape} does not belong to mu {mean.shape}")
    return Statistics(path.name, mean, covariance, n, hashes)
