"""`guidekit fit`: labelled images to a head, in under a minute for twenty of them."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from guidekit.backbones.denoiser import Denoiser
from guidekit.errors import GuidekitError
from guidekit.heads.auto import Candidate, best, candidates
from guidekit.heads.data import Examples
from guidekit.heads.features import (
    Reading,
    cache_folder,
    collect,
    resolve_sites,
)
from guidekit.heads.fingerprint import fingerprint
from guidekit.heads.head import Head, HeadConfig
from guidekit.heads.linear import ESTIMATORS, fit_linear
from guidekit.heads.pixels import (
    EPOCHS,
    HIDDEN,
    MaskRows,
    head_iou,
    put_linear,
    set_statistics,
    train_linear,
    train_mlp,
    varied,
)

TIMESTEP = 500  # the paper's, of 1,000
NOISED_TIMESTEPS = (100, 300, 500, 700, 900)
ESTIMATOR_NAMES = (*ESTIMATORS, "mlp", "linear")


@dataclass(kw_only=True)
class FitOptions:
    """How a head is fitted."""

    sites: tuple[str, ...] = ()  # wildcards of blocks; none is the backbone's default
    timesteps: tuple[int, ...] = ()  # 0 to 1000; none is 500 clean, 100 to 900 noised
    noised: bool = False  # noise the images to the timestep; the paper's are clean
    pool: int = 0  # side of the grid of averages for whole images; 0 is 2
    estimator: str = ""  # logistic | ridge, of masks mlp | linear; "" is logistic or mlp
    auto: bool = False  # choose site, timestep and pool by cross-validation
    budget: float = 30.0  # seconds that `auto` may take
    epochs: int = EPOCHS  # of the mlp
    copies: int = 6  # variants of every image for the mlp, flipped and of other brightness
    prompt: str = ""  # what a model that reads text is told
    seed: int = 0
    cache: Path | None = None  # folder where features stay for the next fit


@dataclass
class FitReport:
    """What a fit did, for people and as JSON."""

    kind: str
    per_class: dict[str, int]
    reading: Reading
    estimator: str
    scores: dict
    notes: list[str] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    denoiser: Denoiser, examples: Examples, options: FitOptions | None = None
) -> tuple[Head, FitReport]:
    """Fits a head on the features of examples.

    Raises GuidekitError for options that do not fit the examples or match nothing.
    """
    options = options or FitOptions()
    started = time.monotonic()
    estimator = _estimator(options, examples.kind)
    reading = _reading(denoiser, options, examples.kind)
    with cache_folder(options.cache) as folder:
        tried = []
        if options.auto:
            tried = candidates(denoiser, examples, reading, folder, options)
            reading = best(tried).reading
        head_of = fit_masks if examples.kind == "masks" else fit_images
        head, notes = head_of(denoiser, examples, reading, estimator, options, folder)
    report = FitReport(
        examples.kind,
        examples.per_class,
        reading,
        estimator,
        head.config.scores,
        notes,
        tried,
        time.monotonic() - started,
    )
    return head.eval().requires_grad_(False), report


def _estimator(options: FitOptions, kind: str) -> str:
    allowed = ("mlp", "linear") if kind == "masks" else ESTIMATORS
    chosen = options.estimator or {"masks": "mlp"}.get(kind, "logistic")
    if chosen not in allowed:
        raise GuidekitError(
            f"the estimator of {kind} is one of {', '.join(allowed)}, not {chosen!r}"
        )
    return chosen


def _reading(denoiser: Denoiser, options: FitOptions, kind: str) -> Reading:
    """The features that the options ask for."""
    sites = resolve_sites(denoiser, options.sites, kind)
    default = NOISED_TIMESTEPS if options.noised else (TIMESTEP,)
    pool = 0 if kind == "masks" else options.pool or 2
    return Reading(sites, options.timesteps or default, options.noised, pool, options.prompt)


def fit_images(
    denoiser: Denoiser,
    examples: Examples,
    reading: Reading,
    estimator: str,
    options: FitOptions,
    folder: Path,
) -> tuple[Head, list[str]]:
    """A linear head of whole images, for classes or for several labels."""
    arrays = collect(denoiser, examples.load, len(examples), reading, folder, examples.key)
    parts = [
        np.concatenate([np.asarray(arrays[f"{t}.{s}"], np.float64) for s in reading.sites], 1)
        for t in reading.timesteps
    ]
    parts = parts if reading.noised else [np.concatenate(parts, 1)]
    config = HeadConfig(
        examples.kind,
        examples.classes,
        reading,
        parts[0].shape[1],
        backbone=fingerprint(denoiser),
    )
    head, scores, notes = Head(config), [], []
    for readout, x in zip(head.readouts, parts, strict=True):
        scores.append(_fit_readout(readout, x, examples, estimator, options.seed))
    if not all(scores):
        notes.append(
            "a class has one example only: no cross-validation, no calibration, the default "
            "strength"
        )
    return _with_scores(head, _mean_scores(scores)), notes


def _fit_readout(readout, x: np.ndarray, examples: Examples, estimator: str, seed: int) -> dict:
    """Fits one readout; returns its scores, empty without cross-validation."""
    if examples.kind == "classes":
        found = fit_linear(x, examples.targets, len(examples.classes), estimator, seed=seed)
        put_linear(readout, found)
        return found.scores and found.scores | {"strength": found.strength}
    rows = [
        _fit_label(x, y, name, estimator, seed)
        for y, name in zip(examples.targets.T, examples.classes, strict=True)
    ]
    put_linear(
        readout,
        dataclasses.replace(
            rows[0],
            weight=np.stack([(r.weight[1] - r.weight[0]) / r.temperature for r in rows]),
            bias=np.array([(r.bias[1] - r.bias[0]) / r.temperature for r in rows]),
            temperature=1.0,
        ),
    )
    return _mean_scores([r.scores for r in rows]) if all(r.scores for r in rows) else {}


def _fit_label(x: np.ndarray, y: np.ndarray, name: str, estimator: str, seed: int):
    """Presence of one label."""
    if len(np.unique(y)) < 2:
        raise GuidekitError(
            f"label {name!r} is {'on every image' if y.any() else 'on no image'}; give "
            "examples with and without it"
        )
    return fit_linear(x, y, 2, estimator, seed=seed)


def fit_masks(
    denoiser: Denoiser,
    examples: Examples,
    reading: Reading,
    estimator: str,
    options: FitOptions,
    folder: Path,
) -> tuple[Head, list[str]]:
    """A mask head at the grid of the denoiser's latents; the last score is of held-out images."""
    copies = options.copies if estimator == "mlp" else 1

    def pictures(rows: list[int]) -> torch.Tensor:
        return torch.stack(
            [
                varied(examples.images(r // copies), examples.masks(r // copies), r % copies)[0]
                for r in rows
            ]
        )

    key = f"{examples.key} {copies} variants"
    arrays = collect(denoiser, pictures, len(examples) * copies, reading, folder, key)
    sizes = [sum(arrays[f"{t}.{s}"].shape[1] for s in reading.sites) for t in reading.timesteps]
    first = denoiser.latents(examples.load([0]).to(denoiser.device))
    config = HeadConfig(
        "masks",
        examples.classes,
        reading,
        sizes[0] if reading.noised else sum(sizes),
        HIDDEN if estimator == "mlp" else (),
        tuple(first.shape[-2:]),
        examples.values,
        fingerprint(denoiser),
    )
    make = _mlp_maker(config, arrays, examples, copies, options)
    if estimator == "linear":
        rows = MaskRows(arrays, Head(config), examples, 1)
        scores = _mean_scores(train_linear(rows, options.seed))
        return _with_scores(rows.head, scores), []
    rows, scores, notes = make(range(len(examples))), {}, []
    held = list(range(0, len(examples), 5))
    rest = [i for i in range(len(examples)) if i not in held]
    if rest:
        scores = {"held_out_miou": head_iou(make(rest), held), "held_out": len(held)}
    else:
        notes.append("one image only: no score on held-out images")
    return _with_scores(rows.head, scores), notes


def _mlp_maker(
    config: HeadConfig, arrays: dict, examples: Examples, copies: int, options: FitOptions
) -> Callable[[list[int]], MaskRows]:
    """Trains the paper's network on the examples of the given numbers."""

    def make(only) -> MaskRows:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(options.seed)
            rows = MaskRows(arrays, Head(config), examples, copies)
            set_statistics(rows)
            train_mlp(rows, options.epochs, seed=options.seed, only=list(only))
        return rows

    return make


def _mean_scores(scores: list[dict]) -> dict:
    """Numbers averaged over readouts or labels."""
    if not scores or not all(scores):
        return {}
    return {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}


def _with_scores(head: Head, scores: dict) -> Head:
    head.config = dataclasses.replace(head.config, scores=scores)
    return head
