"""Launches of the kernels of `attention_map`: strides, ranges, tile sizes, precision.

Imported when an operator first runs, so that without triton only that call fails.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from guidekit_kernels import tiles
from guidekit_kernels.attention_map import (
    INTERPRETED,
    key_gradient,
    log_parts,
    query_gradient,
)
from guidekit_kernels.attention_map_backward import key_kernel, query_kernel
from guidekit_kernels.attention_map_forward import forward_kernel


def launch_forward(
    tensors: Sequence[Tensor | None], given: dict, results: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Fill output, maps and, unless empty, log-sum-exp (see `attention_map.attention_map`)."""
    query = tensors[0]
    b, h, n, _ = query.shape
    out, maps, lse = results
    tile = _tile("forward", tensors)
    target = _computed(out)
    with _device(query):
        forward_kernel[(-(-n // tile.rows) * b * maps.shape[1],)](
            OUT=target,
            MAPS=maps,
            **_log_sum(lse if lse.numel() else None),
            **_arguments(tensors, given, tile),
            **_strides("o", target, "bhn"),
            G=h // maps.shape[1],
        )
    if target is not out:
        out.copy_(target)


def launch_backward(
    tensors: Sequence[Tensor | None],
    given: dict,
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, and of key and value if `keys`."""
    query, key, *_ = tensors
    out, maps, lse = saved
    grad_out = None if grads[0] is None else _unit_stride(_computed(grads[0]))
    shared = dict(
        DOUT=grad_out, **_strides("do", grad_out, "bhn"), **_maps_gradient(grads[1], query)
    )
    dq = _computed(query_gradient(query))
    one = lse is None
    delta = query.new_empty(query.shape[:3], dtype=torch.float32) if keys else None
    if one and keys:
        lse = delta.new_empty(log_parts(tensors[4]), *delta.shape)
    out = None if one else _unit_stride(_computed(out))
    tile = _tile("query", tensors)
    with _device(query):
        query_kernel[(-(-query.shape[2] // tile.rows) * query.shape[0] * query.shape[1],)](
            OUT=out,
            MAPS=maps,
            **_log_sum(lse),
            DELTA=delta,
            DQ=dq,
            ONE=one,
            **shared,
            **_arguments(tensors, given, tile, grad_out),
            **_strides("o", out, "bhn"),
            **_strides("dq", dq, "bhn"),
        )
    dq = dq.to(query.dtype)
    if not keys:
        return dq, key_gradient(key, False), key_gradient(key, False)
    return dq, *_launch_key(tensors, given, shared | _log_sum(lse) | dict(DELTA=delta))


def _launch_key(tensors, given, shared) -> tuple[Tensor, Tensor]:
    query, key, *_ = tensors
    b, _, n, _ = query.shape
    _, hk, t, d = key.shape
    tile = _tile("key", tensors)
    blocks = -(-t // tile.keys)
    parts = tiles.parts(blocks * b * hk, n, tile.rows, tiles.processors(query.device))
    part_rows = -(-n // (parts * tile.rows)) * tile.rows
    parts = -(-n // part_rows)
    # One part is stored in the key's dtype; several are summed in fp32.
    dtype = torch.float32 if parts > 1 or INTERPRETED else key.dtype
    dk, dv = (
        key.new_empty(parts, b, t, hk, d, dtype=dtype).transpose(2, 3) for _ in range(2)
    )  # both (parts, B, Hk, T, d), in the memory order of the projections
    with _device(query):
        key_kernel[(blocks * b * hk, parts)](
            DK=dk,
            DV=dv,
            part_rows=part_rows,
            **shared,
            **_arguments(tensors, given, tile, shared["DOUT"]),
            **_strides("dk", dk, "pbht"),
        )
    # Summed as they lie in memory, so that the sums have the strides that `key_gradient` promises.
    dk, dv = (x.transpose(2, 3).sum(0).transpose(1, 2) if parts > 1 else x[0] for x in (dk, dv))
    return dk.to(key.dtype), dv.to(key.dtype)


def _device(query: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, wherever the tensors lie."""
    return torch.cuda.device(query.device) if query.is_cuda else nullcontext()


def _log_sum(lse: Tensor | None) -> dict:
    """Its one or two parts, or nothing (see `attention_map.log_parts`)."""
    return dict(
        LSE=None if lse is None else lse[0], LOG=None if lse is None or len(lse) == 1 else lse[1]
    )


def _arguments(tensors, given, tile, grad_out=None) -> dict:
    """What all kernels take: inputs, their strides, sizes, ranges and compile-time choices."""
    query, key, value, weights, mask, segments, words = tensors
    (b, h, n, d), (_, hk, t, _) = query.shape, key.shape
    query, key, value = (_unit_stride(_computed(x)) for x in (query, key, value))
    weights = weights.float().expand(b, -1, -1)
    if segments is not None:
        segments, words = (x.float().expand(b, -1, -1) for x in (segments, words))
    mask, masked = _mask(mask, (b, h, n, t))
    columns = 0 if segments is None else segments.shape[1]
    dot, split = _precision(query)
    arguments = dict(
        Q=query,
        K=key,
        V=value,
        W=weights,
        MASK=mask,
        SEGMENTS=segments,
        WORDS=words,
        **_strides("q", query, "bhn"),
        **_strides("k", key, "bht"),
        **_strides("v", value, "bht"),
        **_strides("w", weights, "bts"),
        **_strides("mask", mask, "bhnt"),
        **_strides("seg", segments, "bsn"),
        **_strides("word", words, "bts"),
        scale=given["scale"],
        map_scale=1 / h if given["mean"] else 1.0,
        H=h,
        N=n,
        T=t,
        S=weights.shape[-1],
        C=columns,
        row_start=given["row_start"],
        row_stop=given["row_stop"],
        key_start=given["key_start"],
        key_stop=given["key_stop"],
        SHARED=h // hk,
        D=d,
        BD=tiles.padded(d),
        BM=tile.rows,
        BN=tile.keys,
        BS=_columns(weights.shape[-1]),
        BC=_columns(columns),
        MASKED=masked,
        ALIGN=_alignment(query, key, value, grad_out),
        DOT=dot,
        SPLIT=split,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if mask is not None and mask.stride(2) == 0:
        arguments["mask_n"] = None  # PixArt's and Qwen's: one vector for all queries
    return arguments


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, str]:
    if mask is None:
        return None, "none"
    if mask.ndim > 1 and mask.shape[-2] > 1 and mask.stride(-2) % 16:
        # Rows of 77 or 300 numbers start at odd places: read one by one, their addresses spill.
        mask = F.pad(mask, (0, -shape[3] % 16))[..., : mask.shape[-1]]
    mask = mask.expand(shape)
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), "boolean"
    return _computed(mask), "additive"


def _tile(kernel: str, tensors: Sequence[Tensor | None]) -> tiles.Tile:
    """The table's; a bias or a mask takes registers, so then a smaller one."""
    query, key, _, _, mask, segments, _ = tensors
    sizes = query.shape[3], key.shape[2], query.itemsize
    arch = tiles.architecture(query.device)
    tile = tiles.tile(kernel, *sizes, arch)
    rows = mask is not None and mask.ndim > 1 and mask.shape[-2] > 1
    if query.itemsize == 4:
        return tile
    if arch == 80:
        added = kernel == "query" and key.shape[2] > tile.keys and log_parts(mask) == 2
        return replace(tile, keys=tile.keys // 2) if added else tile
    if not rows and segments is None:
        return tile
    if kernel == "query":  # one block must go on holding all keys
        return replace(tile, rows=max(16, tile.rows // (4 if rows else 2)))
    return tiles.tile(kernel, *sizes, 80)


def _strides(name: str, tensor: Tensor | None, axes: str) -> dict:
    strides = [0] * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=False)}


def _maps_gradient(grad: Tensor | None, query: Tensor) -> dict:
    """Gradient (B, groups, S, rows) with one stride for the head: groups have one gradient each."""
    if grad is not None:
        h, groups, grad = query.shape[1], grad.shape[1], grad.float()
        if groups == 1 or grad.stride(1) == 0:  # as the sum over groups hands it back
            grad = grad[:, :1].expand(-1, h, -1, -1)
        else:
            grad = grad.repeat_interleave(h // groups, 1)
    return dict(DMAPS=grad, **_strides("dm", grad, "bhsn"))


def _computed(tensor: Tensor) -> Tensor:
    """The tensor as the kernel reads it: numpy, under the interpreter, has no bf16."""
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


def _unit_stride(tensor: Tensor) -> Tensor:
    """A tile's rows are found by 32-bit steps from its head's start, its numbers are adjacent."""
    near = tensor.shape[2] * tensor.stride(2) < 2**31
    return tensor if near and tensor.stride(-1) == 1 else tensor.contiguous()


def _alignment(*tensors: Tensor | None) -> int:
    """Power of two up to 16 that divides d and all strides but the last."""
    strides = [s for x in tensors if x is not None for s in x.stride()[:-1]]
    return math.gcd(16, tensors[0].shape[-1], *strides)


def _columns(count: int) -> int:
    """Padded number of map or bias columns; 16 is the least that tensor cores multiply."""
    return max(16, 1 << max(0, count - 1).bit_length())


def _precision(query: Tensor) -> tuple[str, tl.dtype | None]:
    """Precision of fp32 products, and the halves that weights and bias are multiplied in.

    bf16 has the range of fp32, which small weights and gradients need; the interpreter has no
    bf16 product and shows the same arithmetic in fp16.
    """
    if query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee", None
    return "tf32", tl.float16 if INTERPRETED else tl.bfloat16
