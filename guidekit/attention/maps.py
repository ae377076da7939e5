"""Attention maps of chosen key columns, with gradient; P is never kept."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.errors import GuidekitError

# Numbers in one chunk of P in `token_maps`. On a CPU 2**19 to 2**20 was measured fastest (backward
# at N = T = 1100 is 1.3 times slower with 2**23, out of cache); a GPU wants few launches.
CHUNK = 2**20


CHUNK_GPU = 2**25


def token_maps(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    rows: slice = slice(None),
    reduce: str = "mean",
) -> Tensor:
    """Attention that chosen groups of keys receive: softmax(QK^T * scale + mask) @ weights.

    query (B, H, N, d), key (B, Hk, T, d) with Hk dividing H; weights (B or 1, T, S), a column
    per map: one-hot, or 1 or 1/n on the keys of a segment; mask boolean or additive,
    broadcastable to (B, H, N, T); `rows` the queries to read.
    Returns the mean over heads (B, S, rows), or (B, H, S, rows) with reduce="none", in fp32
    (fp64 for fp64 inputs), autocast off. Gradients reach query and key; backward recomputes P
    from query, key and the (B, H, rows) log-sum-exp, in chunks of at most `CHUNK` numbers (or
    one row of one head), so P is never kept. Raises GuidekitError for a mask or weights that
    require grad: their gradient is not computed.
    """
    if reduce not in ("mean", "none"):
        raise GuidekitError(f"reduce is 'mean' or 'none', not {reduce!r}")
    if weights.ndim != 3 or weights.shape[1] != key.shape[2]:
        want = f"(B or 1, T={key.shape[2]}, S)"
        raise GuidekitError(f"weights must be {want}, not {tuple(weights.shape)}")
    if weights.requires_grad or (mask is not None and mask.requires_grad):
        raise GuidekitError("token_maps gives no gradient to weights or mask; detach them")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])[:, :, rows]
    return _TokenMaps.apply(query[:, :, rows], key, weights, mask, float(scale), reduce == "mean")


def resized_logits(
    query: Tensor, mask: Tensor | None, grid: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Query and mask of a call whose logits are those of `grid`, resized to `size`.

    query (B, H, h * w, d); mask (B or 1, H or 1, h * w or 1, T), boolean or additive, or None.
    Resizing is linear in the pixels, so the logits of resized queries are the resized logits.
    Bilinear where it enlarges, the mean over each target pixel where it makes smaller.
    """
    query = _resized_rows(query, grid, size)
    if mask is not None and mask.shape[2] > 1:
        if mask.dtype == torch.bool:
            mask = masked(torch.zeros(mask.shape, device=mask.device), mask)
        shut = torch.finfo(mask.dtype).min / 4  # an infinity times a weight of 0 is no number
        mask = _resized_rows(mask.clamp(min=shut), grid, size)
    return query, mask


def _resized_rows(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Rows (B, H, h * w, C) of a grid as those of another size."""
    if grid == size:
        return x
    images = x.flatten(0, 1).mT.unflatten(2, grid)
    mode = "area" if size[0] < grid[0] else "bilinear"
    images = F.interpolate(images.to(torch.promote_types(x.dtype, torch.float32)), size, mode=mode)
    return images.flatten(2).mT.unflatten(0, x.shape[:2])


class _TokenMaps(torch.autograd.Function):
    """softmax(QK^T) @ weights that saves the log-sum-exp in place of P.

    With P = exp(logits - lse) and G the gradient of the maps, dP = G^T W^T and
    dS = P * (dP - rowsum(P * dP)); dQ = scale dS K, dK = scale dS^T Q.
    """

    @staticmethod
    def forward(ctx, query, key, weights, mask, scale, mean):
        b, h, n = query.shape[:3]
        acc = torch.promote_types(query.dtype, torch.float32)
        weights = weights.to(acc)
        lse = query.new_empty(b, h, n, dtype=acc)
        shape = (b, n, weights.shape[2]) if mean else (b, h, n, weights.shape[2])
        maps = query.new_zeros(shape, dtype=acc)
        with torch.autocast(query.device.type, enabled=False):
            for heads, rows in _chunks(query, key):
                logits, _, _ = logits_of(query, key, mask, scale, heads, rows)
                # A row without any allowed key has maximum -inf and sum 0; the clamps make its
                # P zero, as in SDPA, in place of nan.
                top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(acc).min)
                p = logits.sub_(top).exp_()
                total = p.sum(-1, keepdim=True).clamp_(min=torch.finfo(acc).tiny)
                lse[:, heads, rows] = (top + total.log()).squeeze(-1)
                chunk = (p @ weights[:, None]) / total
                if mean:
                    maps[:, rows] += chunk.sum(1)
                else:
                    maps[:, heads, rows] = chunk
        ctx.save_for_backward(query, key, weights, mask, lse)
        ctx.scale, ctx.mean = scale, mean
        return (maps / h if mean else maps).transpose(-1, -2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, weights, mask, lse = ctx.saved_tensors
        h, hk = query.shape[1], key.shape[1]
        grad = grad.transpose(-1, -2)  # (B, [H,] N, S)
        grad = (grad / h)[:, None].expand(-1, h, -1, -1) if ctx.mean else grad
        dq = torch.empty_like(query, dtype=lse.dtype)
        dk = torch.zeros_like(key, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        columns = weights[:, None].transpose(-1, -2)  # (B or 1, 1, S, T)
        with torch.autocast(query.device.type, enabled=False):
            for heads, rows in _chunks(query, key):
                logits, q, k = logits_of(query, key, mask, ctx.scale, heads, rows)
                p = logits.sub_(lse[:, heads, rows, None]).exp_()
                ds = grad[:, heads, rows] @ columns
                ds = ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale)
                dq[:, heads, rows] = ds @ k
                if dk is not None:
                    dk.index_add_(1, _key_heads(heads, h, hk, dk.device), ds.transpose(-1, -2) @ q)
        return dq.to(query.dtype), None if dk is None else dk.to(key.dtype), *(None,) * 4


def _chunks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Head and row slices whose part of P has at most `CHUNK` numbers."""
    b, h, n = query.shape[:3]
    size = (CHUNK_GPU if query.is_cuda else CHUNK) // (b * key.shape[2])
    rows = max(1, min(n, size))
    heads = max(1, min(h, size // rows))
    for i in range(0, h, heads):
        for j in range(0, n, rows):
            yield slice(i, min(i + heads, h)), slice(j, min(j + rows, n))


def _key_heads(heads: slice, h: int, hk: int, device: torch.device) -> Tensor:
    """Key head that each query head reads; several read one under grouped-query attention."""
    return torch.arange(heads.start, heads.stop, device=device) // (h // hk)


def logits_of(query, key, mask, scale, heads, rows) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of one chunk, and its query and key in the dtype of the accumulation."""
    acc = torch.promote_types(query.dtype, torch.float32)
    h, hk = query.shape[1], key.shape[1]
    q = query[:, heads, rows].to(acc)
    k = key[:, heads] if h == hk else key[:, _key_heads(heads, h, hk, key.device)]
    k = k.to(acc)
    logits = (q * scale) @ k.transpose(-1, -2)
    return masked(logits, None if mask is None else mask[:, heads, rows]), q, k


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The logits with an additive or a boolean mask, True where a key takes part."""
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    return logits + mask.to(logits.dtype)


def probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The attention probabilities (B, H, N, T) of a call, for self-attention maps of small grids.

    query (B, H, N, d), key (B, H, T, d); mask boolean or additive. In fp32 or better, without
    gradient tricks: all of P is kept, so read few sites. For maps of chosen keys see `token_maps`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits, _, _ = logits_of(query, key, mask, scale, slice(0, query.shape[1]), slice(None))
    return logits.softmax(-1)
