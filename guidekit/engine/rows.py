"""Rows of a mask from one value, the others from another."""

from typing import Any

import torch
from torch import Tensor


def rows(mask: Tensor | None, new: Any, old: Any) -> Any:
    """Tensors (B, ...), or what holds them, with the rows of a mask from `new`; None is all."""
    if mask is None or new is old:
        return new
    if isinstance(new, Tensor):
        own = mask if mask.device == new.device else mask.to(new.device)
        return torch.where(own.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    if isinstance(new, tuple | list):
        return type(new)([rows(mask, a, b) for a, b in zip(new, old, strict=True)])
    if isinstance(new, dict):
        return {name: rows(mask, value, old[name]) for name, value in new.items()}
    return new
