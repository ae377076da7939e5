"""Attention output and the attention that chosen keys receive, in one pass, for frozen keys.

For queries (B, H, N, d), keys and values (B, H, T, d), T <= 128, and key weights W (B or 1, T, S)

    P = softmax(Q K^T scale + mask),   O = P V,   M = mean over heads of P W,

without ever writing P (B, H, N, T), with gradients of both to the queries. The kernels and their
mathematics are in `attention_map_kernels`, the torch form in `reference`, tile sizes in `tiles`.
Both passes are registered operators of torch, so torch.compile keeps one graph.

Letters: B batch, H heads, N queries, T keys, S map columns, d head size.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit_kernels import tiles
from guidekit_kernels.tiles import INTERPRETED

HAS_TRITON = importlib.util.find_spec("triton") is not None
# The interpreter has no bf16; fp32 shows the same arithmetic without its rounding.
DTYPES = (torch.float16, torch.bfloat16, *((torch.float32,) if INTERPRETED else ()))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    rows: slice = slice(None),
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, d) of attention, and its maps in fp32.

    query (B, H, N, d), key and value (B, H, T, d) in fp16 or bf16 with T at most 128 and d a
    multiple of 8, at most 160; weights (B or 1, T, S), a column per map, at most 32, rounded to
    bf16: 0 and 1 are exact, an average is divided afterwards. mask boolean (True: may attend) or
    additive, broadcastable to (B, H, N, T); scale None means d ** -0.5. `rows` are the queries to
    read.

    Returns also the mean over heads (B, S, rows), or (B, H, S, rows) with reduce="none". Gradients
    of both reach the query. A row without any allowed key gives zeros. Raises ValueError for what
    `lacks` names, RuntimeError without a GPU of compute capability 8.0 or triton.
    """
    if why := lacks(query, key, value, weights, mask):
        raise ValueError(f"the attention kernels take {why}; 'sdpa' takes others")
    _check_device(query)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    columns = padded_weights(weights, query)
    bias = padded_bias(mask, query, key.shape[2])
    out, maps = attention_map(query, key, value, columns, bias, scale, weights.shape[-1])
    maps = maps[..., rows]
    return out, maps.mean(1) if reduce == "mean" else maps


def lacks(query: Tensor, key: Tensor, value: Tensor, weights: Tensor, mask=None) -> str:
    """What the kernels take and this call is not; empty if they take it."""
    (b, h, n, d), (_, _, t, _) = query.shape, key.shape
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        return f"query, key and value in fp16 or bf16, all in one, not {query.dtype}"
    if key.shape != value.shape or key.shape != (b, h, t, d):
        given = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        return f"query (B, H, N, d), key and value (B, H, T, d), not {given}"
    head = tiles.max_head(query.device)
    if t > tiles.MAX_KEYS or d > head or d % 8:
        most = f"{tiles.MAX_KEYS} keys, heads of at most {head} numbers that 8 divides"
        return f"at most {most}, not {t} keys and {d} numbers"
    if weights.ndim != 3 or len(weights) not in (1, b) or weights.shape[1] != t:
        return f"weights (1 or {b}, {t}, S), not {tuple(weights.shape)}"
    if not 0 < weights.shape[-1] <= tiles.MAX_MAPS:
        return f"1 to {tiles.MAX_MAPS} maps, not {weights.shape[-1]}"
    fixed = [x for x in (key, value, weights, mask) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in fixed):
        return "frozen keys, values, weights and masks, not one that requires grad"
    if max(query.shape[2], 1) * max(h * d, t) >= 2**31:
        return f"fewer than 2**31 numbers of an image, not {n} queries of {h} heads"
    return ""


def _check_device(query: Tensor) -> None:
    if query.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            "the attention kernels need a CUDA device, or TRITON_INTERPRET=1 set "
            "before the start; 'sdpa' runs anywhere"
        )
    if not HAS_TRITON:
        raise RuntimeError(
            "triton is not installed (it has no build for this system, or: "
            "pip install triton); 'sdpa' needs none"
        )


def padded_weights(weights: Tensor, query: Tensor) -> Tensor:
    """Weights in bf16, (B or 1, keys of a tile, columns of a tile), zeros beyond."""
    _, t, s = weights.shape
    more = (0, tiles.map_block(s) - s, 0, tiles.key_block(t) - t)
    return F.pad(weights.to(torch.bfloat16), more).contiguous()


def padded_bias(mask: Tensor | None, query: Tensor, t: int) -> Tensor:
    """A mask as numbers to add, (B or 1, H or 1, N or 1, keys of a tile): -inf past the last key.

    Padded rows also start at multiples of 16 numbers: rows of 77 would be read one by one.
    """
    if mask is None:
        mask = query.new_zeros(t)
    elif mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    mask = mask.to(query.dtype).reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    mask = mask.expand(-1, -1, -1, t)
    return F.pad(mask, (0, tiles.key_block(t) - t), value=float("-inf"))


@torch.library.custom_op("guidekit::attention_map", mutates_args=())
def attention_map(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    bias: Tensor,
    scale: float,
    maps: int,
) -> tuple[Tensor, Tensor]:
    """Output and the first `maps` maps (B, H, maps, N) of each head; see `padded_weights`."""
    from guidekit_kernels.attention_map_launch import launch_forward

    out, found = _results(query, maps)
    launch_forward([query, key, value, weights, bias], scale, out, found)
    return out, found


@attention_map.register_fake
def _(query, key, value, weights, bias, scale, maps):
    return _results(query, maps)


@torch.library.custom_op("guidekit::attention_map_query", mutates_args=())
def attention_map_query(
    grad_out: Tensor,
    grad_maps: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    bias: Tensor,
    scale: float,
) -> Tensor:
    """Gradient of the query."""
    from guidekit_kernels.attention_map_launch import launch_query

    dq = _empty_as(query)
    launch_query([query, key, value, weights, bias], scale, grad_out, grad_maps, dq)
    return dq


@attention_map_query.register_fake
def _(grad_out, grad_maps, query, key, value, weights, bias, scale):
    return _empty_as(query)


def _results(query: Tensor, maps: int) -> tuple[Tensor, Tensor]:
    b, h, n, _ = query.shape
    return _empty_as(query), query.new_empty(b, h, maps, n, dtype=torch.float32)


def _empty_as(query: Tensor) -> Tensor:
    """In memory (B, N, H, d): denoisers join the heads next, which then copies nothing."""
    b, h, n, d = query.shape
    return query.new_empty(b, n, h, d).transpose(1, 2)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out: Tensor, grad_maps: Tensor) -> tuple:
    dq = attention_map_query(grad_out, grad_maps, *ctx.saved_tensors, ctx.scale)
    return dq, *(None,) * 6


attention_map.register_autograd(_backward, setup_context=_setup_context)
