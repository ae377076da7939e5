"""The policy for numbers that are not finite, row by row: raise, or go on without those images."""

import torch
from torch import Tensor

from guidekit.errors import NonFiniteError
from guidekit.step import Step


def finite_rows(step: Step, x: Tensor, text: str, remedy: str, instead: str) -> Tensor:
    """Which images of x (B, ...) are finite (B,).

    text: what it is of x that is not finite, before the seeds of the images. Raises NonFiniteError
    with the remedy where the run's `nonfinite` is "raise"; else notes what is done `instead`.
    """
    finite = torch.isfinite(x).flatten(1).all(1)
    if finite.all():
        return finite
    bad = [seed for seed, fine in zip(step.run.seeds, finite.tolist(), strict=True) if not fine]
    if step.run.nonfinite == "raise":
        raise NonFiniteError(f"{text} for seeds {bad}; {remedy}")
    step.run.account.note(f"{text} for seeds {bad}; {instead}")
    return finite
