"""Descent on z inside a step: the inner loop of attention methods, for the hook `refine`.

Chefer et al. 2023 (Attend-and-Excite, arXiv:2301.13826, section 4), with a stop for each image.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from guidekit.engine.finite import finite_rows
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.step import Step


def descend(
    step: Step,
    guidance: Guidance,
    z: Tensor,
    energy: Callable[[Tensor], Tensor],
    amount: float,
    limit: int,
    until: float | Tensor = -math.inf,
    after: int = 0,
) -> Tensor:
    """z (B, C, h, w) after at most `limit` moves by -amount times the gradient of `energy(z)` (B,).

    until: a number or (B,); an image whose energy is no higher makes `after` moves more and then
    stays as it is, and no further energy is computed once all do. amount: in units of z^2 over the
    energy. The account has the first and the last energy, the last gradient's norm and the number
    of moves of every image. With limit 0 it is z itself. For a gradient that is not finite it
    raises NonFiniteError, or leaves the image as it is, as the run says (`nonfinite`).
    """
    bound = torch.as_tensor(until, device=z.device)
    moves = torch.zeros(len(z), device=z.device)
    left = torch.full_like(moves, after)
    first = norm = value = None
    for _ in range(limit):
        value, grad = _gradient(guidance, energy, z)
        first = value if first is None else first
        there = value <= bound
        moving = (~there | (left > 0)) & _finite(step, guidance, grad)
        left = left - there.to(left)
        if not moving.any():
            break
        rows = moving[:, None, None, None]
        z = torch.where(rows, z - amount * grad, z)
        moved = torch.where(moving, grad.flatten(1).norm(dim=1), 0.0)
        norm = moved if norm is None else torch.where(moving, moved, norm)
        moves = moves + moving
    if value is not None:
        step.run.account.energy(
            guidance.name,
            step.index,
            step.repeat,
            first,
            refined=value,
            grad_norm=torch.zeros_like(moves) if norm is None else norm,
            moves=moves,
        )
    return z


def _gradient(
    guidance: Guidance, energy: Callable[[Tensor], Tensor], z: Tensor
) -> tuple[Tensor, Tensor]:
    """The energies (B,) at z and their gradient (B, C, h, w)."""
    z = z.detach().requires_grad_()
    value = energy(z)
    if value.shape != (len(z),) or not value.requires_grad:
        raise GuidekitError(
            f"{guidance.name} descends on an energy of shape {tuple(value.shape)}; it must be one "
            f"number per image, ({len(z)},), and depend on z"
        )
    (grad,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), grad


def _finite(step: Step, guidance: Guidance, grad: Tensor) -> Tensor:
    """Which gradients are finite (B,); raises NonFiniteError where the run says so."""
    return finite_rows(
        step,
        grad,
        f"gradient of {guidance.name} is not finite at step {step.index}",
        "lower its scale, run in float32, or set nonfinite to 'zero' to skip",
        "those images were not moved at that step",
    )
