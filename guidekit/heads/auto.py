"""`guidekit fit --auto`: site, timestep and pooling by cross-validation within a time budget."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from guidekit.backbones.denoiser import Denoiser
from guidekit.errors import GuidekitError
from guidekit.heads.data import Examples
from guidekit.heads.features import Reading, collect
from guidekit.heads.head import Head, HeadConfig
from guidekit.heads.linear import fit_linear
from guidekit.heads.pixels import MaskRows, sampled_pixels
from guidekit.taps import find_sites

TIMESTEPS = (50, 200, 500, 100, 350, 700)  # in the order in which they are tried
POOLS = (1, 2, 4)
PIXELS = 2_000


@dataclass(frozen=True)
class Candidate:
    """A reading and its cross-validated log loss and accuracy."""

    reading: Reading
    log_loss: float
    accuracy: float


def best(found: list[Candidate]) -> Candidate:
    """The candidate with the least log loss."""
    return min(found, key=lambda c: c.log_loss)


def candidates(
    denoiser: Denoiser, examples: Examples, reading: Reading, folder: Path, options: Any
) -> list[Candidate]:
    """Single sites, then the best two together, at each timestep until the budget is spent.

    Sites and timesteps that the user named are the ones to choose from. Raises GuidekitError where
    the examples allow no cross-validation.
    """
    if min(examples.per_class.values()) < 2:
        raise GuidekitError("--auto needs two examples of every class; name --site and --timestep")
    sites = _choices(denoiser, reading, bool(options.sites))
    stop, found = time.monotonic() + options.budget, []
    for timestep in options.timesteps or TIMESTEPS:
        found += _at(denoiser, examples, reading, sites, timestep, folder, options.pool)
        if time.monotonic() > stop:
            break
    return sorted(found, key=lambda c: c.log_loss)


def _choices(denoiser: Denoiser, reading: Reading, named: bool) -> tuple[str, ...]:
    """The sites to try: those that were named, else whole blocks of the model."""
    if named:
        return reading.sites
    blocks = find_sites(denoiser.model, "*", kind="block")
    return tuple(b for b in blocks if b == "mid_block" or b.count(".") == 1)


def _at(
    denoiser: Denoiser,
    examples: Examples,
    reading: Reading,
    sites: tuple[str, ...],
    timestep: int,
    folder: Path,
    pool: int,
) -> list[Candidate]:
    """Candidates of one timestep: the denoiser is called once for all sites and poolings."""
    masks = examples.kind == "masks"
    sides = (0,) if masks else (pool,) if pool else POOLS
    whole = replace(reading, sites=sites, timesteps=(timestep,), pool=max(sides))
    key = f"{examples.key} auto"
    arrays = collect(denoiser, examples.load, len(examples), whole, folder, key)
    score, found = _pixel_score if masks else _picture_score, []
    for side in sides:
        known = arrays if masks else {n: coarser(a, max(sides), side) for n, a in arrays.items()}
        singles = [score(known, examples, replace(whole, sites=(s,), pool=side)) for s in sites]
        found += singles
        two = [c.reading.sites[0] for c in sorted(singles, key=lambda c: c.log_loss)[:2]]
        if len(two) == 2:
            both = tuple(s for s in sites if s in two)
            found.append(score(known, examples, replace(whole, sites=both, pool=side)))
    return found


def coarser(x: np.ndarray, side: int, wanted: int) -> np.ndarray:
    """Averages on side x side cells (n, C * side^2) as those on `wanted` x `wanted` ones."""
    cells = torch.from_numpy(np.array(x)).unflatten(1, (-1, side, side))
    return F.adaptive_avg_pool2d(cells, wanted).flatten(1).numpy()


def _picture_score(arrays: dict, examples: Examples, reading: Reading) -> Candidate:
    (t,) = reading.timesteps
    x = np.concatenate([np.asarray(arrays[f"{t}.{s}"], np.float64) for s in reading.sites], 1)
    if examples.kind == "classes":
        scores = [fit_linear(x, examples.targets, len(examples.classes)).scores]
    else:
        scores = [fit_linear(x, y, 2).scores for y in examples.targets.T]
    return Candidate(
        reading, *(float(np.mean([s[k] for s in scores])) for k in ("log_loss", "accuracy"))
    )


def _pixel_score(arrays: dict, examples: Examples, reading: Reading) -> Candidate:
    (t,) = reading.timesteps
    channels = sum(arrays[f"{t}.{s}"].shape[1] for s in reading.sites)
    mask = examples.masks(0)
    # At an eighth of the pixels and the finest of the sites' grids a linear head says enough.
    grid = max((arrays[f"{t}.{s}"].shape[-2:] for s in reading.sites), key=lambda g: g[0])
    grid = tuple(int(min(g, m)) for g, m in zip(grid, mask.shape, strict=True))
    head = Head(HeadConfig("masks", examples.classes, reading, channels, grid=grid))
    x, y, groups = sampled_pixels(MaskRows(arrays, head, examples, 1), 0, PIXELS, 0)
    scores = fit_linear(x, y, len(examples.classes), groups=groups).scores
    if not scores:
        raise GuidekitError(
            "--auto needs every class in two masks or more, so that one can be held out; name "
            "--site and --timestep"
        )
    return Candidate(reading, scores["log_loss"], scores["accuracy"])
