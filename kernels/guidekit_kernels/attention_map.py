"""Attention output and the attention that chosen keys receive, in one pass, with gradients.

For queries (B, H, N, d), keys and values (B, Hk, T, d) and key weights W (B or 1, T, S)

    P = softmax(Q K^T scale + mask),   O = P V,   M = mean over heads of P W,

without ever writing P (B, H, N, T): forward carries P W through the online softmax as further
columns of V, in fp32; backward rebuilds P from Q, K and the log-sum-exp, adds the rank-S term
g W^T to dP and otherwise is the backward of flash attention. The mathematics is in
`attention_map_forward` and `attention_map_backward`, the torch form in `reference`, tile sizes in
`tiles`. Both passes are registered operators of torch, so torch.compile keeps one graph.

Letters: B batch, H heads, Hk key heads, N queries, T keys, S map columns, C bias columns, d head
size.
"""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from guidekit_kernels import tiles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
COLUMNS = 32  # maps of one launch; more would not stay in registers


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    rows: slice = slice(None),
    reduce: str = "mean",
    keys: slice = slice(None),
    bias: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, d) of attention, and its maps in fp32.

    query (B, H, N, d), key and value (B, Hk, T, d) with Hk dividing H and d at most 256, in one
    of fp32, fp16, bf16; weights (B or 1, T, S) with a column per map; mask boolean (True: may
    attend) or additive, broadcastable to (B, H, N, T); scale None means d ** -0.5. `rows` are the
    queries to read. `keys` promises that weights are zero outside: in joint attention the text
    tokens. `bias` = (segments (B or 1, C, N), words (B or 1, T, C)) adds segments^T words^T to the
    logits, after the scale, without a (B, N, T) tensor: Paint-with-Words (eDiff-I, Balaji et al.
    2022, arXiv 2211.01324, section 5) with a mask per segment and its strength on its tokens.

    Returns also the mean over heads (B, S, rows), or (B, H, S, rows) with reduce="none". Gradients
    of both reach query, key and value. A row without any allowed key gives zeros. Under autocast
    the inputs take its dtype, as in SDPA. fp32 products are exact unless tf32 is allowed for
    torch's own (torch.set_float32_matmul_precision). More than 32 maps take several launches.
    """
    query, key, value = autocast(query, key, value)
    _check(query, key, value, weights, mask, reduce, bias)
    row_start, row_stop = _bounds(rows, query.shape[2], "rows")
    key_start, key_stop = _bounds(keys, key.shape[2], "keys")
    _check_device(query)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    segments, words = bias or (None, None)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    outs, maps = [], []
    for columns in weights.split(COLUMNS, -1):
        out, part, _ = attention_map(
            query,
            key,
            value,
            columns,
            mask,
            segments,
            words,
            scale,
            row_start,
            row_stop,
            key_start,
            key_stop,
            reduce == "mean",
            save,
        )
        outs.append(out)
        maps.append(part.sum(1) if reduce == "mean" else part)
    return outs[0], maps[0] if len(maps) == 1 else torch.cat(maps, -2)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, where it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


def _check(query, key, value, weights, mask, reduce, bias) -> None:
    (b, h, n, d), (_, hk, t, _) = query.shape, key.shape
    if reduce not in ("mean", "none"):
        raise ValueError(f"reduce is 'mean' or 'none', not {reduce!r}")
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        given = ", ".join(str(x.dtype) for x in (query, key, value))
        raise ValueError(
            f"query, key and value share one of fp32, fp16, bf16, not {given}; 'sdpa' takes others"
        )
    if key.shape != value.shape or key.shape != (b, hk, t, d) or h % hk or d > tiles.MAX_HEAD:
        given = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        raise ValueError(
            "query (B, H, N, d), key and value (B, Hk, T, d) with Hk dividing H and "
            f"d <= {tiles.MAX_HEAD}, not {given}; 'sdpa' takes others"
        )
    _check_factor("weights", weights, b, (t, weights.shape[-1]))
    if weights.shape[-1] == 0:
        raise ValueError("weights have no column (S = 0); without maps call SDPA")
    if bias is not None:
        columns = bias[0].shape[1]
        _check_factor("segments of bias", bias[0], b, (columns, n))
        _check_factor("words of bias", bias[1], b, (t, columns))
        if columns > COLUMNS:
            raise ValueError(f"bias has {columns} columns; at most {COLUMNS}, or pass it as mask")
    if mask is not None:
        sizes = zip(reversed(mask.shape), (t, n, h, b), strict=False)
        if mask.ndim > 4 or any(given not in (1, size) for given, size in sizes):
            raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to {(b, h, n, t)}")
    if max(n, t) * h * d >= 2**31 or (mask is not None and mask.shape[-2:].numel() >= 2**31):
        raise ValueError(
            f"{n} queries, {t} keys: a tensor of one image has 2**31 numbers or more; "
            "'sdpa' takes others"
        )
    segments, words = bias or (None, None)
    fixed = dict(weights=weights, mask=mask, segments=segments, words=words)
    for name, tensor in fixed.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"no gradient is computed to weights, mask or bias ({name}); detach them"
            )


def _check_factor(name: str, tensor: Tensor, b: int, shape: tuple[int, int]) -> None:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, b) or tensor.shape[1:] != shape:
        raise ValueError(
            f"{name} must be (1 or {b}, {shape[0]}, {shape[1]}), not {tuple(tensor.shape)}"
        )


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


def _bounds(part: slice, size: int, name: str) -> tuple[int, int]:
    start, stop, step = part.indices(size)
    if step != 1:
        raise ValueError(f"{name} is a slice of step 1, not {step}; pick from the maps instead")
    return start, max(start, stop)


@torch.library.custom_op("guidekit::attention_map", mutates_args=())
def attention_map(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    words: Tensor | None,
    scale: float,
    row_start: int,
    row_stop: int,
    key_start: int,
    key_stop: int,
    mean: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, maps and log-sum-exp.

    Maps (B, groups of heads, S, rows) are to be summed over groups for the mean; the log-sum-exp in
    base 2 has `log_parts` parts (parts, B, H, N), or nothing where backward will not read it.
    """
    given = dict(
        scale=scale,
        row_start=row_start,
        row_stop=row_stop,
        key_start=key_start,
        key_stop=key_stop,
        mean=mean,
    )
    from guidekit_kernels.attention_map_launch import launch_forward

    tensors = [query, key, value, weights, mask, segments, words]
    results = forward_results(query, key, weights, mask, row_stop - row_start, mean, save)
    launch_forward(tensors, given, results)
    return results


@attention_map.register_fake
def _(
    query,
    key,
    value,
    weights,
    mask,
    segments,
    words,
    scale,
    row_start,
    row_stop,
    key_start,
    key_stop,
    mean,
    save,
):
    return forward_results(query, key, weights, mask, row_stop - row_start, mean, save)


def forward_results(query, key, weights, mask, rows, mean, save) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of the shapes and strides that `attention_map` returns."""
    b, h, n, d = query.shape
    # Memory in the order (B, N, H, d): denoisers join the heads next, which then copies nothing.
    out = query.new_empty(b, n, h, d).transpose(1, 2)
    kept = save and not _one_block(query, key)
    groups = h
    if mean and not kept:
        tile = tiles.tile("forward", d, key.shape[2], query.itemsize, _architecture(query))
        groups = h // tiles.heads_per_program(b, h, n, tile.rows, tiles.processors(query.device))
    maps = query.new_empty(b, groups, weights.shape[-1], rows, dtype=torch.float32)
    lse = query.new_empty((log_parts(mask), b, h, n) if kept else (0,), dtype=torch.float32)
    return out, maps, lse


def log_parts(mask: Tensor | None) -> int:
    """2 if maximum and logarithm of the sum are kept apart: a mask may be as large as finfo.min."""
    return 2 if mask is not None and mask.dtype != torch.bool else 1


def _one_block(query: Tensor, key: Tensor) -> bool:
    return tiles.one_block(query.shape[3], key.shape[2], query.itemsize, _architecture(query))


def _architecture(query: Tensor) -> int:
    return tiles.architecture(query.device)


@torch.library.custom_op("guidekit::attention_map_backward", mutates_args=())
def attention_map_backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    words: Tensor | None,
    out: Tensor | None,
    maps: Tensor | None,
    lse: Tensor | None,
    scale: float,
    row_start: int,
    row_stop: int,
    key_start: int,
    key_stop: int,
    mean: bool,
    keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, and of key and value if `keys`, else nothing for those two."""
    given = dict(
        scale=scale,
        row_start=row_start,
        row_stop=row_stop,
        key_start=key_start,
        key_stop=key_stop,
        mean=mean,
    )
    from guidekit_kernels.attention_map_launch import launch_backward

    tensors = [query, key, value, weights, mask, segments, words]
    return launch_backward(tensors, given, [grad_out, grad_maps], [out, maps, lse], keys)


@attention_map_backward.register_fake
def _(
    grad_out,
    grad_maps,
    query,
    key,
    value,
    weights,
    mask,
    segments,
    words,
    out,
    maps,
    lse,
    scale,
    row_start,
    row_stop,
    key_start,
    key_stop,
    mean,
    keys,
):
    return query_gradient(query), key_gradient(key, keys), key_gradient(key, keys)


def query_gradient(query: Tensor) -> Tensor:
    """An empty gradient of the query in the layout (B, N, H, d) of the projections."""
    b, h, n, d = query.shape
    return query.new_empty(b, n, h, d).transpose(1, 2)


def key_gradient(key: Tensor, wanted: bool) -> Tensor:
    """An empty gradient of key or value, (0,) if not wanted."""
    b, h, t, d = key.shape
    return key.new_empty(b, t, h, d).transpose(1, 2) if wanted else key.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, row_start, row_stop, key_start, key_stop, ctx.mean, _ = inputs
    ctx.ranges = row_start, row_stop, key_start, key_stop
    kept = (None, None, None) if output[2].numel() == 0 else output
    ctx.save_for_backward(*tensors, *kept)
    # A map or an output that nobody used costs no product and no tensor of zeros.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_maps: Tensor | None, _: None) -> tuple:
    keys = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    if grad_out is None and grad_maps is None:
        return (None,) * 14
    dq, dk, dv = attention_map_backward(
        grad_out, grad_maps, *ctx.saved_tensors, ctx.scale, *ctx.ranges, ctx.mean, keys
    )
    return dq, dk if keys else None, dv if keys else None, *(None,) * 11


attention_map.register_autograd(_backward, setup_context=_setup_context)
