"""One attention call of a denoiser, seen where it reaches `F.scaled_dot_product_attention`.

There a call can be read (maps of chosen key columns, with gradient), biased, extended, replaced by
the identity, or run by another implementation. The maps never keep P = softmax(QK^T) for backward.

Letters: B batch, H heads, N queries, T keys, S map columns, d head size.
"""

import functools
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guidekit.attention.choice import automatic, choose

# Numbers in one chunk of P in `token_maps`. On a CPU 2**19 to 2**20 was measured fastest (backward
# at N = T = 1100 is 1.3 times slower with 2**23, out of cache); a GPU wants few launches.
CHUNK = 2**20
CHUNK_GPU = 2**25
KERNELS = "guidekit_kernels.routes"
PAINTED = 32  # segments of a bias that the kernels take by its factors


@dataclass(eq=False)
class AttentionCall:
    """One call of scaled dot product attention, open to change until `run`.

    query (B, H, N, d), key and value (B, Hk, T, d), Hk < H only with `enable_gqa`; mask boolean
    (True: may attend) or additive, broadcastable to (B, H, N, T); scale None means d ** -0.5.
    `index` counts the calls of one forward of the module: with IP-Adapter 0 is the text.
    """

    site: str
    module: nn.Module | None
    index: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    enable_gqa: bool = False
    implementation: str = "sdpa"
    factors: tuple[Tensor, Tensor] | None = None  # see `paint`
    _extensions: list[tuple] = field(default_factory=list, repr=False)
    _identity: bool = field(default=False, repr=False)

    def bias(self, bias: Tensor) -> None:
        """Add `bias` (B or 1, H or 1, N or 1, T) to the logits, after the scale."""
        self.mask = _biased(self.mask, bias.to(self.query.dtype))

    def paint(self, segments: Tensor, words: Tensor) -> None:
        """Add segments^T words^T to the logits, after the scale.

        segments (B, S, N), words (B, T, S). Paint-with-Words (eDiff-I, Balaji et al. 2022, arXiv
        2211.01324, section 5); the triton kernels never write the (B, N, T) of up to 32 segments.
        """
        if self.factors is not None:
            segments = torch.cat([self.factors[0], segments], 1)
            words = torch.cat([self.factors[1], words], 2)
        self.factors = (segments, words)

    def whole_mask(self) -> Tensor | None:
        """`mask` with what `paint` adds, broadcastable to (B, H, N, T)."""
        if self.factors is None:
            return self.mask
        segments, words = self.factors
        return _biased(self.mask, (segments.mT @ words.mT)[:, None].to(self.query.dtype))

    def extend(self, key: Tensor, value: Tensor, scale: float | Tensor = 1.0) -> None:
        """Add `scale` * attention(query, key, value) to the output, without the call's mask.

        key, value (B, Hk, T', d); scale a number or a tensor broadcastable to (B, H, N, d).
        The decoupled form of IP-Adapter (Ye et al. 2023, arXiv 2308.06721, equation 5).
        """
        self._extensions.append((key, value, scale))

    def identity(self, rows: slice = slice(None)) -> None:
        """Replace P by the identity: the output is `value` (PAG, Ahn et al. 2024, 2403.17377).

        With `rows`, the pixels of joint attention, only other pixels are shut, as in diffusers'
        PAG of SD3. Raises ValueError unless queries and keys are the same tokens (N = T).
        """
        n, t = self.query.shape[2], self.key.shape[2]
        if n != t:
            raise ValueError(f"{self.site}: P = I needs self-attention, not {n} queries, {t} keys")
        self._identity = rows.indices(n) == (0, n, 1)
        if not self._identity:
            shut = self.query.new_zeros(1, 1, n, n)
            shut[..., rows, rows] = float("-inf")
            shut.diagonal(dim1=-2, dim2=-1).zero_()
            self.bias(shut)

    def read(self, weights: Tensor, rows: slice | None = None, reduce: str = "mean") -> Tensor:
        """Maps (B, S, rows) of this call with its mask and bias; for the rest see `token_maps`."""
        rows = slice(None) if rows is None else rows
        return token_maps(self.query, self.key, weights, _read_mask(self), self.scale, rows, reduce)

    def run(self) -> Tensor:
        """Output (B, H, N, d) with every change applied, by `self.implementation`."""
        if self._identity:
            group = self.query.shape[1] // self.value.shape[1]
            out = self.value.repeat_interleave(group, dim=1) if group > 1 else self.value
        else:
            out = _RUN[self.implementation](self)
        return self._extended(out)

    def _extended(self, out: Tensor) -> Tensor:
        for key, value, scale in self._extensions:
            out = out + scale * F.scaled_dot_product_attention(
                self.query, key, value, scale=self.scale, enable_gqa=self.enable_gqa
            )
        return out


def _biased(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A boolean, additive or no mask with an additive bias."""
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


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
    one row of one head), so P is never kept. Raises ValueError for a mask or weights that
    require grad: their gradient is not computed.
    """
    if reduce not in ("mean", "none"):
        raise ValueError(f"reduce is 'mean' or 'none', not {reduce!r}")
    if weights.ndim != 3 or weights.shape[1] != key.shape[2]:
        want = f"(B or 1, T={key.shape[2]}, S)"
        raise ValueError(f"weights must be {want}, not {tuple(weights.shape)}")
    if weights.requires_grad or (mask is not None and mask.requires_grad):
        raise ValueError("token_maps gives no gradient to weights or mask; detach them")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])[:, :, rows]
    return _TokenMaps.apply(query[:, :, rows], key, weights, mask, float(scale), reduce == "mean")


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
                logits, _, _ = _logits(query, key, mask, scale, heads, rows)
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
                logits, q, k = _logits(query, key, mask, ctx.scale, heads, rows)
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


def _logits(query, key, mask, scale, heads, rows) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of one chunk, and its query and key in the dtype of the accumulation."""
    acc = torch.promote_types(query.dtype, torch.float32)
    h, hk = query.shape[1], key.shape[1]
    q = query[:, heads, rows].to(acc)
    k = key[:, heads] if h == hk else key[:, _key_heads(heads, h, hk, key.device)]
    k = k.to(acc)
    logits = (q * scale) @ k.transpose(-1, -2)
    return _masked(logits, None if mask is None else mask[:, heads, rows]), q, k


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    return logits + mask.to(logits.dtype)


def _check_plain(call: AttentionCall) -> None:
    """Denoisers attend without causality and dropout, and maps do not have them."""
    if call.is_causal or call.dropout_p:
        raise ValueError(f"{call.site}: no maps of a causal call or of one with dropout")


def _read_mask(call: AttentionCall) -> Tensor | None:
    _check_plain(call)
    return call.whole_mask()


def _run_sdpa(call: AttentionCall) -> Tensor:
    return F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=call.whole_mask(),
        dropout_p=call.dropout_p,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )


def _eager(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output, and P (B, H, N, T) in fp32 or better, kept by autograd."""
    (b, h, n, d), mask = call.query.shape, _read_mask(call)
    mask = None if mask is None else mask.expand(b, h, n, call.key.shape[2])
    scale = d**-0.5 if call.scale is None else call.scale
    value = call.value.repeat_interleave(h // call.value.shape[1], dim=1)
    with torch.autocast(call.query.device.type, enabled=False):
        logits, _, _ = _logits(call.query, call.key, mask, scale, slice(0, h), slice(None))
        # As in SDPA, a row without any allowed key has P = 0; softmax gives nan there.
        p = torch.where(logits.amax(-1, keepdim=True) == float("-inf"), 0, logits.softmax(-1))
        return (p @ value.to(p.dtype)).to(call.query.dtype), p


def _run_xformers(call: AttentionCall) -> Tensor:
    """xformers' kernel; its layout is (B, N, H, d) and it has no grouped-query attention."""
    from xformers.ops import memory_efficient_attention

    group = call.query.shape[1] // call.key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (call.key, call.value))
    mask = _read_mask(call)
    if mask is not None:
        mask = _masked(torch.zeros_like(mask, dtype=call.query.dtype), mask)
        mask = mask.expand(*call.query.shape[:3], key.shape[2])
    q, k, v = (t.transpose(1, 2) for t in (call.query, key, value))
    return memory_efficient_attention(q, k, v, attn_bias=mask, scale=call.scale).transpose(1, 2)


def _run_triton(call: AttentionCall) -> Tensor:
    """Its kernel where a bias has factors, else it has nothing over stock SDPA without maps."""
    if call.factors is None:
        return _run_sdpa(call)
    return _attend_triton(call, call.key.new_zeros(1, call.key.shape[2], 1), slice(0), "mean")[0]


_RUN = {
    "sdpa": _run_sdpa,
    "auto": _run_sdpa,
    "triton": _run_triton,
    "eager": lambda call: _eager(call)[0],
    "xformers": _run_xformers,
}


def attend(
    call: AttentionCall,
    weights: Tensor,
    implementation: str | None = None,
    rows: slice | None = None,
    reduce: str = "mean",
    columns: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and maps of one call: (B, H, N, d) and what `token_maps` returns.

    eager   materialises P and lets autograd keep it; the reference.
    sdpa    in fp32 and fp64 stock SDPA with `weights` appended to V as columns (the output
            within rounding of the untouched call); in half precision, where such maps would
            have three digits, stock SDPA and `token_maps`.
    triton  the kernels of `guidekit_kernels`; `columns`, the keys with weight where they are known,
            let joint attention take the vendor's kernels if its table favours them.
    None means `call.implementation`, which afterwards names the one that ran. Raises ValueError for
    xformers, which returns no maps, and RuntimeError for one that is not available here.

    Measured on one CPU core, fp32, S = 4, forward and backward to the query in ms (and MiB
    saved), for SDPA alone, eager, appended, SDPA with token_maps. H8 N4096 T77 d40: 28 (10),
    23 (10), 32 (12), 51 (11); H4 N = T = 1100 d64, all gradients: 55 (4), 68 (26), 64 (5), 109 (9).
    """
    name = choose(implementation or call.implementation)
    name = automatic(call.query, call.key) if name == "auto" else name
    call.implementation = name
    rows = slice(None) if rows is None else rows
    if name == "xformers":
        raise ValueError("xformers returns no maps; read with: eager, sdpa, triton")
    half = call.value.dtype not in (torch.float32, torch.float64)
    half = half or torch.is_autocast_enabled(call.query.device.type)
    if call._identity or (half and name == "sdpa"):
        return call.run(), call.read(weights, rows, reduce)
    known = {"columns": columns} if name == "triton" and columns is not None else {}
    out, maps = _ATTEND[name](call, weights, rows, reduce, **known)
    return call._extended(out), maps


def _attend_eager(call, weights, rows, reduce) -> tuple[Tensor, Tensor]:
    out, p = _eager(call)
    with torch.autocast(p.device.type, enabled=False):
        maps = (p[:, :, rows] @ weights.to(p.dtype)[:, None]).transpose(-1, -2)
    return out, maps.mean(1) if reduce == "mean" else maps


def _attend_sdpa(call, weights, rows, reduce) -> tuple[Tensor, Tensor]:
    """P @ [V | weights]; zeros keep the sizes equal, without which the CPU has no flash kernel."""
    d, s = call.query.shape[-1], weights.shape[-1]
    extra = -(-s // 8) * 8  # alignment for the CUDA kernels
    columns = F.pad(weights.to(call.value.dtype), (0, extra - s))[:, None]
    columns = columns.expand(*call.value.shape[:3], extra)
    both = F.scaled_dot_product_attention(
        F.pad(call.query, (0, extra)),
        F.pad(call.key, (0, extra)),
        torch.cat([call.value, columns], -1),
        attn_mask=_read_mask(call),
        scale=d**-0.5 if call.scale is None else call.scale,
        enable_gqa=call.enable_gqa,
    )
    maps = both[:, :, rows, d : d + s].transpose(-1, -2)
    return both[..., :d], maps.mean(1) if reduce == "mean" else maps


def _attend_triton(call, weights, rows, reduce, columns=None) -> tuple[Tensor, Tensor]:
    _check_plain(call)
    if columns is not None:
        columns = _on_device(tuple(columns), call.key.device)
    mask, factors = call.mask, call.factors
    if factors is not None and factors[0].shape[1] > PAINTED:
        mask, factors = call.whole_mask(), None
    return importlib.import_module(KERNELS).attend(
        call.query,
        call.key,
        call.value,
        weights,
        mask=mask,
        scale=call.scale,
        rows=rows,
        reduce=reduce,
        columns=columns,
        bias=factors,
    )


@functools.lru_cache(16)
def _on_device(columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of keys where the kernels read them; each copy would wait for the GPU."""
    return torch.tensor(columns, device=device)


_ATTEND = {"eager": _attend_eager, "sdpa": _attend_sdpa, "triton": _attend_triton}
