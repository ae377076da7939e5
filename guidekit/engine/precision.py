"""The loss scale of a denoiser call in float16, whose gradients underflow without one.

Mixed-precision training scales its loss by one number for the whole network (Micikevicius et al.
2018, arXiv:1710.03740, section 3.2) and tries another where that overflows. Here the scale belongs
to a call and to an image: the gradient that enters the call's backward is brought, image by image,
to a largest entry of about 1 by a power of two, and what leaves it is divided by that in float32.
So nothing is tried twice, no image's gradient depends on its batch, second calls have scales of
their own, and autocast is treated as a model in float16 is.
"""

import torch
from torch import Tensor

from guidekit.reads import Eval


class Rescaled:
    """The scale of one call: its input passes `enter`, its evaluations pass `leave`."""

    def __init__(self):
        #: Row by row, one scale (B,) per evaluation; set in backward.
        self.scales: list[Tensor] = []
        self._entered = 0

    def enter(self, x: Tensor) -> Tensor:
        """The input (B, C, h, w) of one branch, whose gradient is divided by the branch's scale."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        number, self._entered = self._entered, self._entered + 1
        return _Enter.apply(wide, self, number)

    def leave(self, evals: list[Eval]) -> list[Eval]:
        """The evaluations, whose gradients together have the scale."""
        for e in evals:
            e.narrow = None if e.out is None else e.out.dtype
        spots = [
            (e, key, value)
            for e in evals
            for key, value in e.tensors().items()
            if value.requires_grad
        ]
        owner = [evals.index(e) for e, _, _ in spots]
        self.scales = [None] * len(evals)
        values = _Leave.apply(self, owner, *[value for _, _, value in spots])
        for (e, key, _), value in zip(spots, values, strict=True):
            e.put(key, value)
        return evals


class _Enter(torch.autograd.Function):
    """The same tensor; divides the gradient by the scale."""

    @staticmethod
    def forward(ctx, x, owner, number):
        ctx.owner, ctx.number = owner, number
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        scale = ctx.owner.scales[ctx.number]
        return (grad if scale is None else _times(grad, 1 / scale)), None, None


class _Leave(torch.autograd.Function):
    """The same tensors in float32; multiplies the gradients of an image by its scale.

    What follows, down to the energies, is in float32, so that nothing is lost before the scale.
    """

    @staticmethod
    def forward(ctx, owner, numbers, *values):
        ctx.owner, ctx.numbers = owner, numbers
        ctx.types = [value.dtype for value in values]
        ctx.set_materialize_grads(False)
        wide = [torch.promote_types(kind, torch.float32) for kind in ctx.types]
        return tuple(
            v.to(t) if v.dtype != t else v.view_as(v) for v, t in zip(values, wide, strict=True)
        )

    @staticmethod
    def backward(ctx, *grads):
        largest: dict[int, Tensor] = {}
        for number, grad in zip(ctx.numbers, grads, strict=True):
            if grad is not None:
                top = grad.detach().flatten(1).abs().amax(1).float()
                known = largest.get(number)
                largest[number] = top if known is None else torch.maximum(known, top)
        for number, top in largest.items():
            ctx.owner.scales[number] = _scale(top)
        return (
            None,
            None,
            *(
                None if g is None else _times(g, ctx.owner.scales[n]).to(kind)
                for n, g, kind in zip(ctx.numbers, grads, ctx.types, strict=True)
            ),
        )


def _scale(largest: Tensor) -> Tensor:
    """Powers of two (B,) that bring the largest entries to 0.5 to 1; 1 where there is none."""
    _, exponent = torch.frexp(largest)
    usable = torch.isfinite(largest) & (largest > 0)
    return torch.where(usable, torch.ldexp(torch.ones_like(largest), -exponent), 1.0)


def _times(grad: Tensor, scale: Tensor) -> Tensor:
    """Each image's gradient times its scale, in float32 and then in its own type."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    shape = (-1, *[1] * (grad.ndim - 1))
    return (grad.to(wide) * scale.to(wide).view(shape)).to(grad.dtype)
