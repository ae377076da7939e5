"""What the commands of `guidekit eval` do: images and judges in, rows out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.evaluate.diversity import spread
from guidekit.evaluate.forms import by_prompt
from guidekit.evaluate.frechet import Moments, frechet, of_gaussians
from guidekit.evaluate.images import ImageSet, prompts_of, read_images
from guidekit.evaluate.intervals import interval
from guidekit.evaluate.judges import (
    Extractor,
    Segmenter,
    check_never_guided,
    load_extractor,
    load_segmenter,
)
from guidekit.evaluate.kernel_distance import kernel_distance
from guidekit.evaluate.label_maps import LabelMaps, Protocol, chosen, held_out, read_label_maps
from guidekit.evaluate.layout import LayoutCounts
from guidekit.evaluate.precision_recall import precision_recall
from guidekit.evaluate.restoration import psnr, ssim
from guidekit.evaluate.results import Results
from guidekit.evaluate.retrieval import ranks
from guidekit.images import to_image, to_uint8
from guidekit.worlds import scenes

BATCH = 16
SPLITS = 10  # of the kernel distance's interval
REFERENCE = 2000  # real scenes for distances, from number 100,000 on
NO_REAL = "There is no row of real images, the judge's own ceiling; give --real."


def real_scenes(plans: list[scenes.Scene], size: int = 64) -> ImageSet:
    """Scenes of the built-in world as images."""

    def opened(plan: scenes.Scene) -> Image:
        return to_image((scenes.batch([plan], size)[0][0] + 1) / 2)

    return ImageSet(
        "real scenes", {str(i): lambda p=plan: opened(p) for i, plan in enumerate(plans)}
    )


# Layout


def layout(
    folders: Sequence[Path],
    maps: str,
    form: str,
    judge: str,
    real: Path | None = None,
    protocol: Protocol = "all",
    paired: bool = False,
) -> Results:
    """mIoU and presence of images by their label maps.

    Raises GuidekitError for a judge that guided, whose classes are others, and for no common image.
    """
    segmenter, wanted = load_segmenter(judge), read_label_maps(maps, form)
    check_never_guided(segmenter, folders)
    numbers = _numbering(segmenter, wanted)
    sets = _rows_of(folders)
    if form == "scenes":
        sets.append(real_scenes(held_out(int(maps))))
    elif real is not None:
        sets.append(ImageSet("real", read_images(real).openers))
    result = Results("layout", judge=_named(segmenter), maps=form, protocol=protocol)
    keys = _common(sets, wanted.keys, result)
    kept = {key: m for key in keys if (m := chosen(wanted.map(key), protocol)) is not None}
    if not kept:
        raise GuidekitError(f"no layout takes part in the protocol {protocol!r}")
    found = {images.name: _counted(images, kept, segmenter, numbers, wanted) for images in sets}
    for name, counts in found.items():
        result.rows.append({"images": name, "n": counts.n} | counts.row())
    if paired:
        first, *others = found
        for name in others:
            row = found[first].against(found[name])
            result.rows.append({"images": f"{first} - {name}", "n": found[first].n} | row)
    if form != "scenes" and real is None:
        result.notes.append(NO_REAL)
    return result


def _rows_of(folders: Sequence[Path]) -> list[ImageSet]:
    """The folders' images, and the unguided ones that runs keep beside them."""
    sets = []
    for folder in folders:
        sets.append(read_images(folder))
        if (folder / "unguided").is_dir():
            unguided = read_images(folder / "unguided")
            sets.append(ImageSet(f"{folder.name} unguided", unguided.openers))
    names = [images.name for images in sets]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise GuidekitError(f"two folders are called {doubled[0]!r}; rename one")
    return sets


def _common(sets: Sequence[ImageSet], keys: Sequence[str], result: Results) -> list[str]:
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


def _numbering(judge: Segmenter, maps: LabelMaps) -> np.ndarray:
    """The maps' number of each of the judge's classes, from 0 for none."""
    if maps.names is None:
        if len(judge.names) != maps.classes:
            raise GuidekitError(
                f"{judge.name} has {len(judge.names)} classes and {maps.form} {maps.classes}; take "
                "a judge that was trained on it"
            )
        return np.arange(maps.classes + 1)
    order = {name.casefold(): i + 1 for i, name in enumerate(maps.names)}
    table = np.array([0, *(order.get(name.casefold(), 0) for name in judge.names)])
    if not table.any():
        raise GuidekitError(
            f"{judge.name} knows none of the maps' classes, such as {maps.names[0]!r}; it knows "
            f"{', '.join(judge.names[:8])} ..."
        )
    return table


def _counted(
    images: ImageSet,
    kept: dict[str, np.ndarray],
    judge: Segmenter,
    numbers: np.ndarray,
    maps: LabelMaps,
) -> LayoutCounts:
    """What the judge sees, counted at the size of the images."""
    counts = LayoutCounts(maps.classes)
    for key, wanted in kept.items():
        (seen,) = judge.read([images.image(key)])
        counts.add(numbers[seen][None], _resized(wanted, seen.shape)[None])
    return counts


def _resized(wanted: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A class map at another size, each pixel the one that lies under its middle."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(shape, wanted.shape, strict=True)
    )
    return wanted[np.ix_(rows, columns)]


def _named(judge: Segmenter | Extractor) -> dict[str, Any]:
    return {"name": judge.name, "sha256": sorted(judge.hashes)}


# Quality


def quality(
    folders: Sequence[Path], real: str, features: str, draws: int = 100, neighbours: int = 3
) -> Results:
    """Frechet and kernel distance, precision and recall, of equal numbers of images.

    real: a folder, `scenes`, or an .npz of `mu` and `sigma`, for which there is no other distance.
    """
    extractor = load_extractor(features)
    check_never_guided(extractor, folders)
    result = Results("quality", judge=_named(extractor), draws=draws)
    sets = _rows_of(folders)
    n = min(map(len, sets))
    if n < max(map(len, sets)):
        result.notes.append(f"Rows have the first {n} images, as many as the smallest.")
    if real.endswith(".npz"):
        mean, covariance = _statistics(Path(real))
        for images in sets:
            value = _to_gaussian(images, n, extractor, mean, covariance)
            result.rows.append({"images": images.name, "n": n, "Frechet": value})
        return result
    plans = [scenes.scene(100_000 + i, "test") for i in range(REFERENCE)]
    reference = _features(
        real_scenes(plans) if real == "scenes" else read_images(Path(real)), extractor
    )
    for images in sets:
        row = {"images": images.name, "n": n, "n real": len(reference)}
        found = _features(images, extractor, n)
        result.rows.append(row | _distances(found, reference, draws, neighbours))
    half = len(reference) // 2
    if half > neighbours + 1:
        row = {"images": "real against real", "n": half, "n real": len(reference) - half}
        own = _distances(reference[:half], reference[half:], draws, neighbours)
        result.rows.append(row | own)
    return result


def _features(images: ImageSet, extractor: Extractor, n: int | None = None) -> np.ndarray:
    """Features of the first n images, or of all."""
    return np.concatenate(list(_shards(images, extractor, n)))


def _shards(images: ImageSet, extractor: Extractor, n: int | None) -> Iterator[np.ndarray]:
    for part in images.batches(BATCH, images.keys[:n]):
        yield np.concatenate([extractor.read([image]) for image in part])


def _statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance as pytorch-fid and others save them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["mu"], file["sigma"]
    except (OSError, ValueError, KeyError) as error:
        raise GuidekitError(f"{path}: no statistics with mu and sigma ({error})") from None


def _to_gaussian(
    images: ImageSet, n: int, extractor: Extractor, mean: np.ndarray, covariance: np.ndarray
) -> float:
    """Frechet distance of n images to statistics; of the images only sums are kept."""
    moments = Moments()
    for features in _shards(images, extractor, n):
        if features.shape[1] != len(mean):
            raise GuidekitError(
                f"the statistics have {len(mean)} features, and {extractor.name} has "
                f"{features.shape[1]}"
            )
        moments.add(features)
    return of_gaussians(moments.mean, moments.covariance, mean, covariance)


def _distances(
    made: np.ndarray, real: np.ndarray, draws: int, neighbours: int
) -> dict[str, object]:
    """A row's numbers: of the Frechet distance a bootstrap's interval, of the kernel's splits'."""

    def distance(i: np.ndarray) -> float:
        return frechet(made[i], real)

    row: dict[str, object] = {"Frechet": distance(np.arange(len(made)))}
    if draws:
        row["Frechet 95%"] = interval(distance, len(made), draws)
    row["kernel"] = kernel_distance(made, real)
    parts = [kernel_distance(part, real) for part in np.array_split(made, SPLITS) if len(part) > 1]
    if len(parts) == SPLITS:
        error = 1.96 * float(np.std(parts, ddof=1)) / SPLITS**0.5
        row["kernel 95%"] = (row["kernel"] - error, row["kernel"] + error)
    if min(len(made), len(real)) > neighbours:
        both = torch.from_numpy(made), torch.from_numpy(real)
        row["precision"], row["recall"] = precision_recall(*both, neighbours)
    return row


# Prompts, retrieval, diversity


def prompts(folders: Sequence[Path], clip: str, paired: bool = False) -> Results:
    """CLIP score, 100 max(cos, 0), with intervals over prompts. Hessel et al. 2021."""
    extractor = _clip(clip)
    check_never_guided(extractor, folders)
    result = Results("prompts", judge=_named(extractor))
    found: dict[str, dict[str, float]] = {}
    for folder in folders:
        images, texts = read_images(folder), prompts_of(folder)
        groups = by_prompt(images, texts)
        scores = {p: float(_scores(images, extractor, p, k).mean()) for p, k in groups.items()}
        row = {"images": images.name, "n": sum(map(len, groups.values())), "prompts": len(groups)}
        result.rows.append(row | _mean("CLIP score", np.array([*scores.values()])))
        found[images.name] = scores
    if paired:
        result.rows += _differences("CLIP score", found, "prompts")
    return result


def _differences(
    name: str, found: dict[str, dict[str, float]], unit: str
) -> Iterator[dict[str, object]]:
    """Rows of the first folder's numbers minus each other's, of what both have."""
    first, *others = found
    for other in others:
        common = [key for key in found[first] if key in found[other]]
        if not common:
            raise GuidekitError(f"{first} and {other} have no {unit} in common, so no differences")
        gaps = np.array([found[first][key] - found[other][key] for key in common])
        yield {"images": f"{first} - {other}", unit: len(common)} | _mean(name, gaps)


def _scores(images: ImageSet, clip: Extractor, prompt: str, keys: list[str]) -> np.ndarray:
    """CLIP scores of one prompt's images."""
    seen = np.concatenate([clip.read(part) for part in images.batches(BATCH, keys)])
    return 100 * np.maximum(seen @ clip.texts([prompt])[0], 0)


def _clip(name: str) -> Extractor:
    extractor = load_extractor(name)
    if extractor.texts is None:
        raise GuidekitError(f"{name} reads no texts; give a CLIP, such as scenes-clip")
    return extractor


def _mean(name: str, values: np.ndarray) -> dict[str, object]:
    """A column: the mean of numbers of images or prompts, and its interval."""
    bounds = interval(lambda i: float(values[i].mean()), len(values))
    return {name: float(values.mean()), f"{name} 95%": bounds}


def retrieval(
    folders: Sequence[Path], real: Path, clip: str, among: int = 99, seed: int = 0
) -> Results:
    """How often an image is among the first 1, 5 and 10 of `among` real ones by its prompt."""
    extractor = _clip(clip)
    check_never_guided(extractor, folders)
    others = _features(read_images(real), extractor)
    if len(others) < among:
        raise GuidekitError(f"{real} has {len(others)} images; give {among}, or --among fewer")
    result = Results("retrieval", judge=_named(extractor), among=among)
    for folder in folders:
        images, texts = read_images(folder), prompts_of(folder)
        keys = [key for key in images.keys if key in texts]
        seen = np.concatenate([extractor.read(part) for part in images.batches(BATCH, keys)])
        places = ranks(seen, extractor.texts([texts[k] for k in keys]), others, among, seed)
        row: dict[str, object] = {"images": images.name, "n": len(keys)}
        for k in (1, 5, 10):
            row |= _mean(f"top {k}", (places < k).astype(float))
        result.rows.append(row)
    return result


def diversity(folders: Sequence[Path], features: str) -> Results:
    """Mean distance of an extractor's features between the images of each prompt."""
    extractor = load_extractor(features)
    check_never_guided(extractor, folders)
    result = Results("diversity", judge=_named(extractor), pairs="all of one prompt")
    for folder in folders:
        images, texts = read_images(folder), prompts_of(folder)
        groups = [keys for keys in by_prompt(images, texts).values() if len(keys) > 1]
        if not groups:
            raise GuidekitError(f"{folder} has one image of each prompt; diversity needs two")
        found = [
            spread(np.concatenate([extractor.read(p) for p in images.batches(BATCH, keys)]))
            for keys in groups
        ]
        row = {"images": images.name, "n": sum(map(len, groups)), "prompts": len(groups)}
        result.rows.append(row | _mean("distance", np.array(found)))
    return result


# Inverse problems


def inverse(folders: Sequence[Path], real: Path, paired: bool = False) -> Results:
    """PSNR and SSIM to the true images of the same names."""
    truth = read_images(real)
    sets = _rows_of(folders)
    result = Results("inverse", real=str(real))
    keys = _common(sets, truth.keys, result)
    found: dict[str, dict[str, dict[str, float]]] = {"PSNR": {}, "SSIM": {}}
    for images in sets:
        pairs = {key: (_values(images.image(key)), _values(truth.image(key))) for key in keys}
        if wrong := [key for key, (a, b) in pairs.items() if a.shape != b.shape]:
            raise GuidekitError(f"{images.name}: {wrong[0]} is not of its true image's size")
        row: dict[str, object] = {"images": images.name, "n": len(keys)}
        for name, measure in (("PSNR", psnr), ("SSIM", ssim)):
            values = {key: float(measure(a, b)) for key, (a, b) in pairs.items()}
            row |= _mean(name, np.array([*values.values()]))
            found[name][images.name] = values
        result.rows.append(row)
    if paired:
        columns = [_differences(name, values, "n") for name, values in found.items()]
        result.rows += [a | b for a, b in zip(*columns, strict=True)]
    return result


def _values(image: Image) -> Tensor:
    return to_uint8(image)[None].double() / 255
