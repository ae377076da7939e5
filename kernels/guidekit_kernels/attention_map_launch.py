"""Launches of the two kernels of `attention_map`: strides, tile sizes, dtypes.

Imported when an operator first runs, so that without triton only that call fails.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from guidekit_kernels import tiles
from guidekit_kernels.attention_map_kernels import forward_kernel, query_kernel
from guidekit_kernels.tiles import INTERPRETED


def launch_forward(inputs: list[Tensor], scale: float, out: Tensor, maps: Tensor) -> None:
    """Fills output and maps for query, key, value, weights and bias as `prepared` made them."""
    target = _computed(out)
    _launch(
        forward_kernel,
        "forward",
        inputs,
        [target],
        dict(out=_rows(target), maps=maps, scale=scale, S=maps.shape[2]),
    )
    if target is not out:
        out.copy_(target)


def launch_query(
    inputs: list[Tensor], scale: float, grad_out: Tensor, grad_maps: Tensor, dq: Tensor
) -> None:
    """Fills the gradient of the queries."""
    target, grad_out = _computed(dq), _adjacent(_computed(grad_out))
    _launch(
        query_kernel,
        "query",
        inputs,
        [target, grad_out],
        dict(
            dq=_rows(target),
            dout=_rows(grad_out),
            dmaps=(grad_maps, *grad_maps.stride()),
            scale=scale,
            S=grad_maps.shape[2],
        ),
    )
    if target is not dq:
        dq.copy_(target)


def _launch(kernel, name: str, inputs: list[Tensor], others: list[Tensor], own: dict) -> None:
    """Runs a kernel on one program per block of queries and head."""
    query, key, value = (_adjacent(_computed(x)) for x in inputs[:3])
    weights, bias = map(_computed, inputs[3:])
    (b, h, n, d), t = query.shape, key.shape[2]
    tile = tiles.tile(name, d, tiles.architecture(query.device))
    with _device(query):
        kernel[(-(-n // tile.rows) * b * h,)](
            q=_rows(query),
            k=_rows(key),
            v=_rows(value),
            w=(weights, weights.stride(0) if len(weights) > 1 else 0),
            bias=_rows(bias.expand(b, h, -1, -1)),
            **own,
            H=h,
            N=n,
            T=t,
            D=d,
            BD=tiles.padded(d),
            BM=tile.rows,
            BT=bias.shape[-1],
            BS=weights.shape[-1],
            ROWS=bias.shape[2] > 1,
            ALIGN=_alignment(d, query, key, value, *others),
            num_warps=tile.warps,
            num_stages=1,
        )


def _rows(tensor: Tensor) -> tuple:
    """A tensor (B, H, rows, numbers) as the kernels take it: with the strides of its rows."""
    return (tensor, *tensor.stride()[:3])


def _device(query: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, wherever the tensors lie."""
    return torch.cuda.device(query.device) if query.is_cuda else nullcontext()


def _computed(tensor: Tensor) -> Tensor:
    """The tensor as the kernel reads it: numpy, under the interpreter, has no bf16."""
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


def _adjacent(tensor: Tensor) -> Tensor:
    """A tile's rows are found by 32-bit steps from its head's start, its numbers are adjacent."""
    near = tensor.shape[2] * tensor.stride(2) < 2**31
    return tensor if near and tensor.stride(-1) == 1 else tensor.contiguous()


def _alignment(d: int, *tensors: Tensor) -> int:
    """Power of two up to 16 that divides d and all strides but the last."""
    return math.gcd(16, d, *(s for x in tensors for s in x.stride()[:-1]))
