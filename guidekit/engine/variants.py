"""What reads want of an attention call: weights at its keys, maps that are no plain average."""

import torch
from torch import Tensor

from guidekit.attention.call import AttentionCall
from guidekit.attention.maps import resized_logits, token_maps
from guidekit.backbones.records import Family
from guidekit.reads import AttentionRead


def placed(weights: Tensor, family: Family, call: AttentionCall) -> Tensor:
    """Weights (B, T, S) of text tokens at the columns that text has among the call's keys."""
    keys, n_text = call.key.shape[2], weights.shape[1]
    if keys == n_text:
        return weights
    full = weights.new_zeros(len(weights), keys, weights.shape[2])
    full[:, family.text_keys(keys, n_text)] = weights
    return full


def variant(call: AttentionCall, read: AttentionRead, family: Family, rows: slice) -> Tensor:
    """Maps per head, over some of the tokens, or with further keys in the softmax."""
    key, weights, mask = call.key, placed(read.weights, family, call), call.mask
    if read.tokens is not None:
        allowed = torch.zeros(len(read.tokens), key.shape[2], dtype=torch.bool, device=key.device)
        n_text = read.weights.shape[1]
        allowed[:, family.text_keys(key.shape[2], n_text)] = read.tokens.to(key.device)
        mask = _both(mask, allowed[:, None, None], call)
    if read.extra is not None:
        extra = _extra_keys(call, read.extra)
        key = torch.cat([key, extra], 2)
        weights = torch.nn.functional.pad(weights, (0, 0, 0, extra.shape[2]))
        mask = None if mask is None else _open(mask, extra.shape[2])
    query = call.query[:, :, rows]
    mask = _cut_rows(mask, rows)
    if read.resize:
        query, mask = resized_logits(query, mask, read.sites[call.site], read.resize)
    reduce = "none" if read.per_head else "mean"
    return token_maps(query, key, weights, mask, call.scale, reduce=reduce)


def _cut_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The rows of a mask (B or 1, H or 1, N or 1, T), which may be one for all queries."""
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]


def _both(mask: Tensor | None, allowed: Tensor, call: AttentionCall) -> Tensor:
    """The call's mask with the tokens outside `allowed` shut."""
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, float("-inf"))


def _open(mask: Tensor, count: int) -> Tensor:
    """The mask with `count` open columns more."""
    value = True if mask.dtype == torch.bool else 0.0
    return torch.nn.functional.pad(mask, (0, count), value=value)


def _extra_keys(call: AttentionCall, states: Tensor) -> Tensor:
    """Keys (B, H, E, d) of text states (E, D), by the module's own projection."""
    batch, heads, _, d = call.key.shape
    projected = call.module.to_k(states.to(call.key.dtype))
    return projected.view(1, -1, heads, d).transpose(1, 2).expand(batch, -1, -1, -1)
