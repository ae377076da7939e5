"""Attention with maps of few keys around the vendor's kernels: the cheap route of joint attention.

Where queries and keys are the same few thousand tokens, nearly all time goes into products that
stock attention computes as well, with kernels tuned by the vendor. Forward is theirs and hands out
the log-sum-exp; P at the K chosen columns alone is then exp(scale Q K_chosen^T - lse), and the maps
are P_chosen W. In backward, with dO and g the gradients of the output and of a head's maps,

    w = P_chosen * (g W^T),   c = rowsum(w),
    dS = P * (dO V^T - rowsum(dO * O) - c)  +  w at the chosen columns,

(see `attention_map_backward`), the first part is theirs up to c, the second a product of rank K.
Vendors' backward kernels read O for nothing but delta = rowsum(dO * O), so c enters through it:
O' = O + c dO / |dO|^2 has rowsum(dO * O') = delta + c. Where dO vanishes beside c, a row of dO
is first replaced by one so small that dO V^T stays below the rounding of c.

Exact up to rounding in the dtype of the tensors: O' is stored in it, so c keeps 8 bits in bf16.
Costs beside stock attention: reads of Q, O, dO and (B, H, rows, K) numbers in fp32.
"""

import torch
from torch import Tensor

from guidekit_kernels.attention_map import autocast

ATEN = torch.ops.aten


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    columns: Tensor | None = None,
    scale: float | None = None,
    rows: slice = slice(None),
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, d) and maps in fp32 (fp64 for fp64), (B, S, rows) or (B, H, S, rows).

    As `attention_map.attend`, without masks and grouped queries. `columns` (K,) are the keys that
    have weight, each once, in any order; None looks them up, which waits for the GPU and which
    torch.compile cannot trace. Raises ValueError where no vendor kernel fits (see `vendor`).
    """
    query, key, value = autocast(query, key, value)
    name, why = vendor(query, key, value)
    if name is None:
        raise ValueError(f"the vendor's route {why}; attention_map.attend takes more")
    if weights.requires_grad:
        raise ValueError("no gradient is computed to weights; detach them")
    if columns is None:
        columns = weights.ne(0).any(0).any(-1).nonzero().squeeze(-1)
    start, stop, _ = rows.indices(query.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = weights[:, columns].to(torch.promote_types(query.dtype, torch.float32))
    with torch.autocast(query.device.type, enabled=False):
        return _Joint.apply(
            query, key, value, chosen, columns, scale, start, stop, reduce == "mean", name
        )


def vendor(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[str | None, str]:
    """Name of the kernels that this call would run on, or None and the reason.

    Not in fp16: O' (see above) may pass its largest number, and small gradients its smallest.
    """
    d, tensors = query.shape[-1], (query, key, value)
    if mask is not None:
        return None, "takes no mask"
    if not query.shape[1] == key.shape[1] == value.shape[1] or value.shape[-1] != d:
        return None, "needs as many key heads as query heads, and values of their size"
    if len({x.dtype for x in tensors}) > 1 or any(x.stride(-1) != 1 for x in tensors):
        return None, "needs one dtype, and heads whose numbers are adjacent"
    if query.device.type == "cpu":
        return (None, "has no fp16") if query.dtype == torch.float16 else ("cpu", "")
    if query.device.type != "cuda" or query.dtype != torch.bfloat16 or d % 8:
        return None, "needs bf16 on a CUDA device and a head size that 8 divides"
    hopper = torch.cuda.get_device_capability(query.device)[0] in (9, 10)
    if hopper and d <= 128 and torch.backends.cuda.cudnn_sdp_enabled():
        return "cudnn", ""
    return ("flash", "") if d <= 256 else (None, "ends at head size 256")


class _Joint(torch.autograd.Function):
    """Both outputs and their gradients; plain aten calls, which torch.compile traces."""

    @staticmethod
    def forward(ctx, query, key, value, weights, columns, scale, start, stop, mean, name):
        out, lse, *rest = _FORWARD[name](query, key, value, scale)
        rows = slice(start, stop)
        p = _chosen(query[:, :, rows], key[:, :, columns], lse, rows, scale)
        maps = (p @ weights[:, None]).mT
        ctx.save_for_backward(query, key, value, weights, columns, out, lse)
        ctx.rest, ctx.options = rest, (scale, rows, mean, name)
        ctx.set_materialize_grads(False)
        return out, maps.mean(1) if mean else maps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_maps):
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return _joint_backward(ctx, grad_out, grad_maps)


def _joint_backward(ctx, grad_out: Tensor | None, grad_maps: Tensor | None) -> tuple:
    """Gradients of query, key and value, and nothing for the other inputs."""
    query, key, value, weights, columns, out, lse = ctx.saved_tensors
    scale, rows, mean, name = ctx.options
    if grad_maps is None:
        if grad_out is None:
            return (None,) * 10
        dq, dk, dv = _BACKWARD[name](grad_out, query, key, value, out, lse, ctx.rest, scale)
        return dq, dk, dv, *(None,) * 7
    q, k = query[:, :, rows], key[:, :, columns]
    g = grad_maps.mT
    g = (g / query.shape[1])[:, None] if mean else g
    w = _chosen(q, k, lse, rows, scale) * (g @ weights[:, None].mT)  # (B, H, rows, K)
    extra = w.new_zeros(query.shape[:3])
    extra[:, :, rows] = w.sum(-1)
    only_maps = grad_out is None
    if only_maps:  # with V = 0 nothing but the row sums is left of the vendor's part
        grad_out, out, value = (torch.zeros_like(x) for x in (out, out, value))
        grad_out[..., 0] = 1
        out[..., 0] = extra
    else:
        grad_out, out = with_row_sums(grad_out, out, extra, value)
    dq, dk, dv = _BACKWARD[name](grad_out, query, key, value, out, lse, ctx.rest, scale)
    dq[:, :, rows] += (scale * (w @ k.to(w.dtype))).to(dq.dtype)
    dk.index_add_(2, columns, (scale * (w.mT @ q.to(w.dtype))).to(dk.dtype))
    return dq, dk, torch.zeros_like(dv) if only_maps else dv, *(None,) * 7


def _chosen(query: Tensor, key: Tensor, lse: Tensor, rows: slice, scale: float) -> Tensor:
    """P (B, H, rows, K) of a few keys from the log-sum-exp of all."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(wide) @ key.to(wide).mT * scale
    return logits.sub_(lse.reshape(*lse.shape[:2], -1)[:, :, rows, None]).exp_()


def with_row_sums(grad: Tensor, out: Tensor, extra: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """dO' and O' (B, H, N, d) with rowsum(dO' * O') = rowsum(dO * O) + extra (B, H, N).

    dO' is dO but in rows smaller than eps |extra| / max|V|, whose share of dP is below the
    rounding of extra: they become that size in their first number, and O' stays in range.
    """
    eps = torch.finfo(grad.dtype).eps
    least = extra.abs() * eps / value.abs().amax().to(extra.dtype).clamp(min=eps)
    norm = torch.linalg.vector_norm(grad, dim=-1, dtype=extra.dtype)
    weak = norm < least
    grad = grad.masked_fill(weak[..., None], 0)
    grad[..., 0] += torch.where(weak, least, 0).to(grad.dtype)
    size = torch.where(weak, grad[..., 0].to(extra.dtype), norm)
    factor = torch.where(size > 0, extra / size, 0) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return grad, (out + factor[..., None] * grad).to(out.dtype)


def _cpu_forward(query, key, value, scale):
    return ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)


def _cpu_backward(grad, query, key, value, out, lse, rest, scale):
    return ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, False, scale=scale
    )


def _flash_forward(query, key, value, scale):
    return ATEN._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:8]


def _flash_backward(grad, query, key, value, out, lse, rest, scale):
    *lengths, state, unused = rest
    return ATEN._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse, *lengths, 0.0, False, state, unused, scale=scale
    )


def _cudnn_forward(query, key, value, scale):
    return ATEN._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)[:8]


def _cudnn_backward(grad, query, key, value, out, lse, rest, scale):
    *lengths, seed, offset = rest
    return ATEN._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out, lse, seed, offset, None, *lengths, 0.0, False, scale=scale
    )


_FORWARD = {"cpu": _cpu_forward, "flash": _flash_forward, "cudnn": _cudnn_forward}
_BACKWARD = {"cpu": _cpu_backward, "flash": _flash_backward, "cudnn": _cudnn_backward}
