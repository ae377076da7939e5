"""Another z at the level of a step, from the hook `refine`, before the branches are evaluated."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from guidekit.backbones.schedulers import lost_edit
from guidekit.engine.acting import acting
from guidekit.engine.calls import own_branches
from guidekit.engine.finite import finite_rows
from guidekit.engine.hooks import Hooks
from guidekit.engine.rows import rows
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.noise import wide
from guidekit.step import Step


def refined(
    step: Step, guidances: Sequence[Guidance], opened: Callable[[], AbstractContextManager]
) -> Tensor:
    """The z (B, C, h, w) of a step as its guidances refine it, which becomes the step's.

    It is the very same tensor where none of them has made another. opened: the run's taps. Raises
    GuidekitError where the scheduler would lose it, and for a z of another shape.
    """
    z = step.z
    active = [g for g in guidances if g.overrides("refine") and g.active(step.frac, step.level)]
    if not active or not step.begins_step:
        return z
    _check_reads(step, active[0])
    hooks, found = Hooks(step, active), wide(z.detach())[0]
    step.branches = own_branches(step.run)  # a hook may denoise one of them
    with torch.enable_grad(), opened():
        for guidance in active:
            found = _one(hooks, guidance, found)
    vars(step).pop("move", None)  # it has not seen the branches' learned variance
    step.z = z if torch.equal(found, z) else found.to(z.dtype)
    return step.z


def _one(hooks: Hooks, guidance: Guidance, z: Tensor) -> Tensor:
    """The z that one guidance makes; what is not finite follows the run's policy, row by row."""
    step = hooks.step
    found = hooks.ask(guidance, "refine", step, z)
    if found.shape != z.shape:
        raise GuidekitError(
            f"{guidance.name} refines z {tuple(z.shape)} into {tuple(found.shape)}; return its "
            "own shape"
        )
    found = found.detach().to(z.dtype)
    finite = finite_rows(
        step,
        found,
        f"{guidance.name} refines z at step {step.index} to NaN or infinity",
        "lower its scale, or set nonfinite to 'zero' to leave them as they were",
        "they were left as they were at that step",
    )
    found = rows(acting(step, guidance), torch.where(finite[:, None, None, None], found, z), z)
    if not torch.equal(found, z):
        hooks.changed(guidance.name)
    return found


def _check_reads(step: Step, guidance: Guidance) -> None:
    """Raises GuidekitError for a scheduler whose step starts from another z."""
    if not step.run.levels.move(step.index).reads_sample:
        raise lost_edit(step.run.scheduler, f"{guidance.name} refines z")
