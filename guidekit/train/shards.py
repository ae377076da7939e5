"""Weights that FSDP2 deals out to all processes, and those that each holds whole."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes where each holds a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dealt_like(weight: Tensor, value: Tensor) -> Tensor:
    """The value cut into shards as the weight is; a step counter stays whole."""
    if not isinstance(weight, DTensor) or value.shape != weight.shape:
        return value
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements)
