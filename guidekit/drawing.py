"""Drawing in one call: a run to iterate over, or finished images in batches."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from guidekit.backbones.denoiser import Denoiser
from guidekit.errors import GuidekitError, nearest
from guidekit.groups import batches, rows_by_group, with_particles
from guidekit.guidance import Guidance
from guidekit.inputs.given import as_conditions, as_denoiser
from guidekit.sampler import Asked, Sampling, accepted
from guidekit.seeds import Seeds, derived_seed

P = ParamSpec("P")


def _taking(
    options: Callable[P, Sampling],
) -> Callable[[Callable[..., Sampling]], Callable[P, Sampling]]:
    """For a function that takes what another does, so that editors and type checkers know it."""

    def marked(function: Callable[..., Sampling]) -> Callable[P, Sampling]:
        function.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]
        return function

    return marked


@_taking(Sampling)
def sample(*given: Any, **options: Any) -> Sampling:
    """Starts drawing images; see `Sampling` for what it takes."""
    _check_names("sample", options)
    return Sampling(*given, **options)


def _check_names(function: str, options: Iterable[str]) -> None:
    """Raises GuidekitError for an option that no run has."""
    known = inspect.signature(Sampling).parameters
    for name in options:
        if name not in known:
            raise GuidekitError(
                f"guidekit.{function} has no option {name!r}{nearest(name, list(known))}; it has "
                f"{', '.join(known)}"
            )


def draw(
    denoiser: Denoiser | DiffusionPipeline | str,
    conditions: Asked | Sequence[Asked],
    guidances: Guidance | str | Sequence[Guidance | str] = (),
    *,
    seeds: int | str | Iterable[int] = (0,),
    batch: int = 4,
    tries: int = 1,
    particles: int = 1,
    **options: Any,
) -> Tensor:
    """Images (len(seeds), 3, H, W) in [0, 1], drawn in batches that cut no group.

    Where guidances reject images (`accept`), those are drawn again from seeds derived from their
    own, at most `tries` times in all; the last draw stays. Raises GuidekitError for groups that are
    to be drawn again, of which some images would be missing.
    """
    _check_names("draw", options)
    denoiser, seeds = as_denoiser(denoiser), list(Seeds(seeds))
    conditions = with_particles(as_conditions(conditions, len(seeds)), particles)
    if tries > 1 and len(rows_by_group(conditions)) < len(seeds):
        raise GuidekitError("tries draws single images again, which would cut groups; leave it out")
    images: dict[int, Tensor] = {}
    left = list(range(len(seeds)))
    for attempt in range(tries):
        rejected = []
        for rows in batches([conditions[j] for j in left], batch):
            part = [left[row] for row in rows]
            own = [seeds[j] if attempt == 0 else derived_seed(seeds[j], attempt) for j in part]
            drawn = Sampling(
                denoiser, [conditions[j] for j in part], guidances, seeds=own, **options
            ).finish()
            finished = drawn.images
            kept = accepted(drawn.guidances, finished)
            for j, image, keep in zip(part, finished, kept.tolist(), strict=True):
                images[j] = image
                rejected += [] if keep else [j]
        left = rejected
    return torch.stack([images[i] for i in range(len(seeds))])
