"""Attention calls of random numbers, their masks, and their softmax in full."""

import torch

from guidekit.attention.call import AttentionCall


def make_call(b=2, h=4, hk=4, n=12, t=7, d=8, dtype=torch.float32, grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(b, heads, size, d, generator=generator, dtype=dtype, requires_grad=grad)
        for heads, size in ((h, n), (hk, t), (hk, t))
    )
    return AttentionCall("site", None, 0, q, k, v, enable_gqa=hk < h)


def segments(t, dtype=torch.float32):
    """Three columns (1, T, 3): one token, the mean of two, the sum of the rest."""
    weights = torch.zeros(1, t, 3, dtype=dtype)
    weights[0, 1, 0] = 1
    weights[0, 2:4, 1] = 0.5
    weights[0, 4:, 2] = 1
    return weights


def softmax_of(call, mask=None, scale=None):
    k = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    scale = call.query.shape[-1] ** -0.5 if scale is None else scale
    logits = call.query @ k.transpose(-1, -2) * scale
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf"))
    return (logits if mask is None else logits + mask).softmax(-1)


def masks(b, h, n, t):
    generator = torch.Generator().manual_seed(1)
    boolean = torch.rand(b, 1, 1, t, generator=generator) > 0.4
    boolean[..., 1] = True
    additive = torch.randn(b, h, n, t, generator=generator)
    return {"none": None, "boolean": boolean, "additive": additive, "row": additive[:, :, :1]}
