"""What the commands of `guidekit eval` do: images and judges in, rows out."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.evaluate.diversity import spread
from guidekit.evaluate.forms import by_prompt
from guidekit.evaluate.images import ImageSet, found_prompts, prompts_of, read_images
from guidekit.evaluate.judges import (
    Extractor,
    Segmenter,
    check_never_guided,
    load_extractor,
    load_reward,
    load_segmenter,
)
from guidekit.evaluate.label_maps import LabelMaps, Protocol, chosen, held_out, read_label_maps
from guidekit.evaluate.layout import LayoutCounts
from guidekit.evaluate.lpips import load_lpips
from guidekit.evaluate.quality import quality
from guidekit.evaluate.restoration import psnr, ssim
from guidekit.evaluate.results import Results
from guidekit.evaluate.retrieval import ranks
from guidekit.evaluate.rows import (
    BATCH,
    REAL,
    check_paired,
    common_keys,
    compared,
    differences,
    features_of,
    lacking,
    mean_column,
    named,
    prompted,
    real_images,
    real_scenes,
    rows_of,
)
from guidekit.evaluate.statistics import gathered
from guidekit.images import to_uint8

__all__ = ["diversity", "gathered", "inverse", "layout", "prompts", "quality", "retrieval"]
__all__ += ["reward"]

TOP = (1, 5, 10)  # places of retrieval


# Layout


def layout(
    folders: Sequence[Path],
    maps: str,
    form: str,
    judge: str,
    real: Path | None = None,
    protocol: Protocol = "all",
    clip: str | None = None,
    paired: bool = False,
) -> Results:
    """mIoU and presence of images by their label maps; of a CLIP the score of their prompts too.

    Raises GuidekitError for a judge that guided, whose classes are others, and for no common image.
    """
    segmenter, wanted = load_segmenter(judge), read_label_maps(maps, form)
    check_never_guided(segmenter, folders)
    reader = None if clip is None else _clip(clip)
    if reader is not None:
        check_never_guided(reader, folders)
    numbers = _numbering(segmenter, wanted)
    sets = rows_of(folders)
    if form == "scenes":
        sets.append(real_scenes(held_out(int(maps))))
    elif real is not None:
        sets.append(real_images(real))
    check_paired(sets, paired)
    result = Results("layout", judge=named(segmenter), maps=form, protocol=protocol)
    keys = common_keys(sets, wanted.keys, result)
    kept = {key: m for key in keys if (m := chosen(wanted.map(key), protocol)) is not None}
    if not kept:
        raise GuidekitError(f"no layout takes part in the protocol {protocol!r}")
    texts = {} if reader is None else _prompts_of_all(folders[0], kept)
    found = {images.name: _counted(images, kept, segmenter, numbers, wanted) for images in sets}
    for name, counts in found.items():
        result.rows.append({"images": name, "n": counts.n} | counts.row())
    if paired:
        for first, other, _ in compared(dict.fromkeys(found, kept), "n"):
            row = found[first].against(found[other])
            result.rows.append({"images": f"{first} - {other}", "n": len(kept)} | row)
    if reader is not None:
        _add_clip_scores(result, sets, texts, reader, paired)
    result.notes += lacking(sets, form == "scenes" or real is not None)
    return result


def _prompts_of_all(folder: Path, keys: Iterable[str]) -> dict[str, str]:
    """The prompts of a folder's images; raises GuidekitError where one has none."""
    texts = prompts_of(folder)
    if lacking := [key for key in keys if key not in texts]:
        raise GuidekitError(f"{folder} has no prompt of {lacking[0]!r}, which --clip needs")
    return {key: texts[key] for key in keys}


def _add_clip_scores(
    result: Results,
    sets: Sequence[ImageSet],
    texts: dict[str, str],
    clip: Extractor,
    paired: bool,
) -> None:
    """A column of CLIP scores of images by their prompts, with intervals over layouts."""
    result.facts["clip"], told = named(clip), clip.texts([*texts.values()])
    found = {
        images.name: dict(zip(texts, _scores(_seen(images, clip, [*texts]), told), strict=True))
        for images in sets
    }
    columns = [mean_column("CLIP score", np.array([*own.values()])) for own in found.values()]
    if paired:
        columns += differences({"CLIP score": found}, "n")
    for row, column in zip(result.rows, columns, strict=True):
        row |= column


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


# Prompts, retrieval, diversity


def prompts(
    folders: Sequence[Path], clip: str, real: Path | None = None, paired: bool = False
) -> Results:
    """CLIP score, 100 max(cos, 0), with intervals over prompts. Hessel et al. 2021.

    real: real images with their prompts, for a row of their own.
    """
    extractor = _clip(clip)
    check_never_guided(extractor, folders)
    result = Results("prompts", judge=named(extractor))
    found: dict[str, dict[str, float]] = {}
    rows = prompted(folders, paired, real)
    for images, texts in rows:
        groups = by_prompt(images, texts)
        told = dict(zip(groups, extractor.texts([*groups]), strict=True))
        scores = {
            prompt: float(_scores(_seen(images, extractor, keys), told[prompt]).mean())
            for prompt, keys in groups.items()
        }
        row = {"images": images.name, "n": sum(map(len, groups.values())), "prompts": len(groups)}
        result.rows.append(row | mean_column("CLIP score", np.array([*scores.values()])))
        found[images.name] = scores
    if paired:
        result.rows += differences({"CLIP score": found}, "prompts")
    result.notes += lacking([images for images, _ in rows], real is not None)
    return result


def _scores(seen: np.ndarray, told: np.ndarray) -> np.ndarray:
    """CLIP scores (n,) of features (n, d) of images, and of their texts (n, d) or (d,)."""
    return 100 * np.maximum((seen * told).sum(1), 0)


def _seen(images: ImageSet, extractor: Extractor, keys: list[str]) -> np.ndarray:
    """Features (n, d) of the images with these keys."""
    return np.concatenate([extractor.read(part) for part in images.batches(BATCH, keys)])


def _clip(name: str) -> Extractor:
    extractor = load_extractor(name)
    if extractor.texts is None:
        raise GuidekitError(f"{name} reads no texts; give a CLIP, such as scenes-clip")
    return extractor


def retrieval(
    folders: Sequence[Path],
    real: Path,
    clip: str,
    among: int = 99,
    seed: int = 0,
    paired: bool = False,
) -> Results:
    """How often an image is among the first 1, 5 and 10 of `among` real ones by its prompt.

    Real images that have prompts are a row too, each among others.
    """
    extractor = _clip(clip)
    check_never_guided(extractor, folders)
    truth = real_images(real)
    others = features_of(truth, extractor)
    if len(others) < among:
        raise GuidekitError(f"{real} has {len(others)} images; give {among}, or --among fewer")
    called = len(others) > among and not found_prompts(real).keys().isdisjoint(truth.keys)
    result = Results("retrieval", judge=named(extractor), among=among)
    columns: dict[str, dict[str, dict[str, float]]] = {f"top {k}": {} for k in TOP}
    rows = prompted(folders, paired, real if called else None)
    for images, texts in rows:
        keys = [key for key in images.keys if key in texts]
        told = extractor.texts([texts[k] for k in keys])
        if images.name == REAL:
            own = np.flatnonzero([key in texts for key in images.keys])
            places = ranks(others[own], told, others, among, seed, own)
        else:
            places = ranks(_seen(images, extractor, keys), told, others, among, seed)
        row: dict[str, object] = {"images": images.name, "n": len(keys)}
        for k, (name, found) in zip(TOP, columns.items(), strict=True):
            hits = (places < k).astype(float)
            # Of images that are called alike but show other prompts there is no difference.
            found[images.name] = {
                f"{key} {texts[key]}": h for key, h in zip(keys, hits, strict=True)
            }
            row |= mean_column(name, hits)
        result.rows.append(row)
    if paired:
        result.rows += differences(columns, "n")
    result.notes += lacking([images for images, _ in rows], called)
    return result


def diversity(
    folders: Sequence[Path],
    features: str,
    real: Path | None = None,
    lpips: Path | None = None,
    paired: bool = False,
) -> Results:
    """Mean distance between the images of each prompt, of an extractor's features and by LPIPS.

    real: real images, some of one prompt, for a row of their own.
    """
    extractor = load_extractor(features)
    perceptual = None if lpips is None else load_lpips(lpips)
    check_never_guided(extractor, folders)
    result = Results("diversity", judge=named(extractor), pairs="all of one prompt")
    columns: dict[str, dict[str, dict[str, float]]] = {"distance": {}}
    if perceptual is not None:
        check_never_guided(perceptual, folders)
        result.facts["lpips"], columns["LPIPS"] = named(perceptual), {}
    rows = prompted(folders, paired, real)
    for images, texts in rows:
        groups = {p: keys for p, keys in by_prompt(images, texts).items() if len(keys) > 1}
        if not groups:
            raise GuidekitError(f"{images.name} has one image of each prompt; diversity needs two")
        row = {"images": images.name, "n": sum(map(len, groups.values())), "prompts": len(groups)}
        for name, found in columns.items():
            found[images.name] = {
                prompt: perceptual.spread(keys, images.image)
                if name == "LPIPS"
                else spread(_seen(images, extractor, keys))
                for prompt, keys in groups.items()
            }
            row |= mean_column(name, np.array([*found[images.name].values()]))
        result.rows.append(row)
    if paired:
        result.rows += differences(columns, "prompts")
    result.notes += lacking([images for images, _ in rows], real is not None)
    return result


def reward(
    folders: Sequence[Path], of: str, real: Path | None = None, paired: bool = False
) -> Results:
    """A reward of every image, a known one or MODULE:NAME, with intervals over images."""
    judge = load_reward(of)
    check_never_guided(judge, folders)
    result = Results("reward", judge=named(judge))
    found: dict[str, dict[str, float]] = {}
    sets = rows_of(folders)
    check_paired(sets, paired)
    sets += [] if real is None else [real_images(real)]
    for images in sets:
        found[images.name] = own = {k: judge.read([images.image(k)])[0] for k in images.keys}
        row = {"images": images.name, "n": len(own)}
        result.rows.append(row | mean_column("reward", np.array([*own.values()])))
    if paired:
        result.rows += differences({"reward": found}, "n")
    result.notes += lacking(sets, real is not None)
    return result


# Inverse problems


def inverse(
    folders: Sequence[Path], real: Path, lpips: Path | None = None, paired: bool = False
) -> Results:
    """PSNR and SSIM to the true images of the same names, and LPIPS by its weights."""
    truth = read_images(real)
    sets = rows_of(folders)
    check_paired(sets, paired)
    result = Results("inverse", real=str(real))
    keys = common_keys(sets, truth.keys, result)
    measures = {"PSNR": _of_values(psnr), "SSIM": _of_values(ssim)}
    if lpips is not None:
        perceptual = load_lpips(lpips)
        check_never_guided(perceptual, folders)
        result.facts["lpips"], measures["LPIPS"] = named(perceptual), perceptual.distance
    columns: dict[str, dict[str, dict[str, float]]] = {name: {} for name in measures}
    for images in sets:
        pairs = {key: (images.image(key), truth.image(key)) for key in keys}
        if wrong := [key for key, (a, b) in pairs.items() if a.size != b.size]:
            raise GuidekitError(f"{images.name}: {wrong[0]} is not of its true image's size")
        row: dict[str, object] = {"images": images.name, "n": len(keys)}
        for name, measure in measures.items():
            columns[name][images.name] = own = {k: measure(*pair) for k, pair in pairs.items()}
            row |= mean_column(name, np.array([*own.values()]))
        result.rows.append(row)
    if paired:
        result.rows += differences(columns, "n")
    result.notes += lacking(sets, real=True)  # the truth is what all are measured by
    return result


def _of_values(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Image, Image], float]:
    """A measure of tensors (1, 3, H, W) in [0, 1] as one of images."""
    return lambda a, b: float(measure(_values(a), _values(b)))


def _values(image: Image) -> Tensor:
    return to_uint8(image)[None].double() / 255
