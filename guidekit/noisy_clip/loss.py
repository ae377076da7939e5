"""Symmetric InfoNCE over all processes: van den Oord et al. 2018 (arXiv:1807.03748)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(a: Tensor, b: Tensor, scale: Tensor | float, keys: Tensor | None = None) -> Tensor:
    """Mean of both cross-entropies of matching embeddings a and b (B, D), a[i] belonging to b[i].

    scale: factor on the cosines. keys (B,): rows with equal keys are no negatives of one another.
    Negatives come from all processes. Gradients, averaged over processes as DDP does it, are those
    of one process with the whole batch.
    """
    a, b = (gathered(F.normalize(x.float(), dim=-1)) for x in (a, b))
    with torch.autocast(a.device.type, enabled=False):  # bf16 near 100 has steps of a half
        logits = scale * a @ b.T
    if keys is not None:
        keys = gathered(keys)
        same = (keys[:, None] == keys) & ~torch.eye(len(keys), dtype=torch.bool, device=keys.device)
        logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def gathered(x: Tensor) -> Tensor:
    """Rows of all processes; the own ones keep their graph."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous())
    # DDP divides the sum of gradients by the number of processes; each has its own rows' share.
    parts[rank] = x if not x.is_floating_point() else world * x - (world - 1) * x.detach()
    return torch.cat(parts)
