"""What a run cannot be: numbers, images, targets and schedulers that would not do what is asked."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from guidekit.backbones.denoiser import Denoiser
from guidekit.backbones.schedulers import schedulers_for
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.noise import is_flow


def check_numbers(steps: int, **numbers: float) -> None:
    """Raises GuidekitError for no step, and for a number that is negative or not finite."""
    if steps < 1:
        raise GuidekitError(f"steps must be at least 1, not {steps}")
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise GuidekitError(f"{name} must be a finite number of at least 0, not {value}")


def check_images(
    denoiser: Denoiser, conditions: list[Condition], guidances: Sequence[Guidance]
) -> None:
    """Raises GuidekitError for a reference image that nothing reads."""
    given = any(c.image is not None for c in conditions)
    if given and not (denoiser.reads_image or any(g.reads_image for g in guidances)):
        raise GuidekitError(
            f"{type(denoiser.pipeline).__name__} reads no image; leave it out, or name a plugin "
            "that does, such as semantica with an adapter"
        )


def check_maps(denoiser: Denoiser, conditions: list[Condition]) -> None:
    """Raises GuidekitError for a label map that nothing reads."""
    if any(c.map is not None for c in conditions) and not denoiser.reads_map:
        raise GuidekitError(
            "nothing here reads a label map; leave the map out, name a control without an image "
            "(--control FOLDER), or take a model of maps"
        )


def check_targets(conditions: list[Condition], guidances: Sequence[Guidance]) -> None:
    """Raises GuidekitError for a target of a guidance that is not there."""
    names = {g.name for g in guidances}
    for name in sorted({name for c in conditions for name in c.targets} - names):
        exist = ", ".join(sorted(names)) or "none"
        raise GuidekitError(f"a condition has a target for {name!r}; the guidances are {exist}")


def check_scheduler(scheduler: Any, own: Any, steps: int) -> None:
    """Raises GuidekitError for too few steps, and for a flow scheduler for a model that is none.

    And for the reverse. PNDM's Runge-Kutta start takes its `pndm_order` last steps.
    """
    least = getattr(scheduler, "pndm_order", 0)
    if steps < least and not scheduler.config.get("skip_prk_steps", True):
        raise GuidekitError(f"{type(scheduler).__name__} needs at least {least} steps, not {steps}")
    if is_flow(scheduler) != is_flow(own):
        raise GuidekitError(
            f"{type(scheduler).__name__} and the pipeline's {type(own).__name__} differ in what "
            "the model's output means to them: one is for flow models, the other is not; DPM++ and "
            "UniPC are both, by use_flow_sigmas"
        )


def step_arguments(scheduler: Any, eta: float, generators: list[torch.Generator]) -> dict[str, Any]:
    """What the scheduler's step takes, as diffusers' pipelines find it out.

    Raises GuidekitError for a noise that the scheduler would ignore.
    """
    accepted = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in accepted:
        raise GuidekitError(
            f"{type(scheduler).__name__} has no eta; leave it at 0"
            + (" or use --scheduler ddim" if "ddim" in schedulers_for(scheduler) else "")
        )
    given = {"eta": eta, "generator": generators}
    return {name: value for name, value in given.items() if name in accepted}
