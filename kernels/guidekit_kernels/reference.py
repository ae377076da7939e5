"""Torch references of the kernels: short, slow, and what the tests hold the kernels to."""

import torch
from torch import Tensor


def attention_map(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    rows: slice = slice(None),
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Output O = P V (B, H, N, d) and maps P W (B, [H,] S, rows), with P materialised.

    P = softmax(Q K^T scale + mask). Everything is computed in the dtype of the inputs: in float64
    this is the truth, in fp16 the error that a kernel may be held to. See `attention_map.attend`
    for the shapes.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query @ key.transpose(-1, -2) * scale
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        logits = logits + mask.to(query.dtype)
    nothing = logits.amax(-1, keepdim=True) == float("-inf")
    p = torch.where(nothing, 0, logits.masked_fill(nothing, 0).softmax(-1))
    maps = (p[:, :, rows] @ weights.to(p.dtype)[:, None]).transpose(-1, -2)
    return p @ value, maps.mean(1) if reduce == "mean" else maps
