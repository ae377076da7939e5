"""Symmetric InfoNCE over all processes: van den Oord et al. 2018 (arXiv:1807.03748)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(a: Tensor, b: Tensor, scale: Tensor | float, keys: Tensor | None = None) -> Tensor:
    """Mean of both cross-entropies of matching embeddings a and b (B, D), a[i] belonging to b[i].

    scale: factor on the cosines. keys (B,): rows with equal keys are no negatives of one another.
    Negatives come from all processes: each compares its own rows with the columns of all, so its
    memory grows with the number of processes and not with its square. Losses and gradients,
    averaged over processes as DDP does it, are those of one process with the whole batch.
    """
    own = [F.normalize(x.float(), dim=-1) for x in (a, b)]
    columns = [gathered(x) for x in own]
    place = torch.arange(len(a), device=a.device) + _rank() * len(a)
    same = None
    if keys is not None:
        same = keys[:, None] == gathered(keys)
        same[torch.arange(len(a), device=a.device), place] = False
    losses = []
    for rows, others in zip(own, reversed(columns), strict=True):
        with torch.autocast(a.device.type, enabled=False):  # bf16 near 100 has steps of a half
            logits = scale * rows @ others.T
        if same is not None:
            logits = logits.masked_fill(same, -torch.inf)
        losses.append(F.cross_entropy(logits, place))
    return sum(losses) / 2


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0


def gathered(x: Tensor) -> Tensor:
    """Rows of all processes; gradients go back to the process that a row came from."""
    if _world() == 1:
        return x
    return _Gathered.apply(x) if x.is_floating_point() else _all(x)


def _all(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(_world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _Gathered(torch.autograd.Function):
    """all_gather whose backward sums what all processes say of each row."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return _all(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[_rank() * ctx.rows : (_rank() + 1) * ctx.rows]
