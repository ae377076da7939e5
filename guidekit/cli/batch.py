"""One batch of a plan, begun and drawn: the same for a run and for a block of many."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit.backbones.denoiser import Denoiser
from guidekit.cli.plan import Plan, Target
from guidekit.errors import NonFiniteError
from guidekit.guidance import Guidance
from guidekit.sampler import Sampling
from guidekit.seeds import derived_seed
from guidekit.step import Step


@dataclass(frozen=True)
class Drawn:
    """The images (B, 3, H, W) in [0, 1] of a batch."""

    images: Tensor
    #: Which ones the pipeline's safety checker blackened; None without one.
    black: list[bool] | None


def begin(
    plan: Plan,
    targets: tuple[Target, ...],
    guidances: tuple[Guidance, ...],
    attempt: int = 0,
    calls: dict[str, str] | None = None,
) -> Sampling:
    """A batch with the settings of the plan; later attempts have seeds of their own."""
    s = plan.settings
    return Sampling(
        plan.denoiser,
        [target.condition for target in targets],
        guidances,
        seeds=_seeds(targets, attempt),
        steps=s.steps,
        cfg=s.cfg,
        embedded_cfg=s.embedded_cfg,
        eta=s.eta,
        height=s.height,
        width=s.width,
        scheduler=plan.scheduler,
        memory=s.memory,
        nonfinite=s.nonfinite,
        attention=s.attention,
        compile=s.compile or False,
        calls=calls,
    )


def _seeds(targets: tuple[Target, ...], attempt: int) -> list[int]:
    """The seeds of an attempt: their own, then derived ones."""
    seeds = [target.seed for target in targets]
    return seeds if attempt == 0 else [derived_seed(seed, attempt) for seed in seeds]


def finish(
    denoiser: Denoiser, sampling: Sampling, tell: Callable[[Step], None] | None = None
) -> Drawn:
    """Draws a batch to its end; its images are black where the model's checker says so.

    Raises NonFiniteError for images with NaN, which would be black files.
    """
    images = sampling.finish(tell).images
    finite = torch.isfinite(images).flatten(1).all(1).tolist()
    if bad := [seed for seed, fine in zip(sampling.seeds, finite, strict=True) if not fine]:
        raise NonFiniteError(
            f"the images of seeds {bad} are not finite; lower the scale of a plugin, cfg or "
            "eta, or use --dtype float32"
        )
    return Drawn(images, sampling.black)
