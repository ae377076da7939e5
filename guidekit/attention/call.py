"""One attention call of a denoiser, seen where it reaches `F.scaled_dot_product_attention`.

There a call can be read (maps of chosen key columns, with gradient), biased, extended, replaced by
the identity, or run by another implementation. The maps never keep P = softmax(QK^T) for backward.

Letters: B batch, H heads, N queries, T keys, S map columns, d head size.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guidekit.attention.choice import automatic, choose
from guidekit.attention.maps import logits_of, masked, token_maps
from guidekit.errors import GuidekitError

KERNELS = "guidekit_kernels.attention_map"


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
    made: Tensor | None = field(default=None, repr=False)  # what `run` gave
    _extensions: list[tuple] = field(default_factory=list, repr=False)
    _identity: bool = field(default=False, repr=False)

    def bias(self, bias: Tensor) -> None:
        """Add `bias` (B or 1, H or 1, N or 1, T) to the logits, after the scale."""
        self.mask = _biased(self.mask, bias.to(self.query.dtype))

    def paint(self, segments: Tensor, words: Tensor) -> None:
        """Add segments^T words^T to the logits, after the scale.

        segments (B, S, N), words (B, T, S). Paint-with-Words (eDiff-I, Balaji et al. 2022, arXiv
        2211.01324, section 5).
        """
        self.bias((segments.mT @ words.mT.to(segments.dtype))[:, None])

    def extend(self, key: Tensor, value: Tensor, scale: float | Tensor = 1.0) -> None:
        """Add `scale` * attention(query, key, value) to the output, without the call's mask.

        key, value (B, Hk, T', d); scale a number or a tensor broadcastable to (B, H, N, d).
        The decoupled form of IP-Adapter (Ye et al. 2023, arXiv 2308.06721, equation 5).
        """
        self._extensions.append((key, value, scale))

    def identity(self, rows: slice = slice(None)) -> None:
        """Replace P by the identity: the output is `value` (PAG, Ahn et al. 2024, 2403.17377).

        With `rows`, the pixels of joint attention, only other pixels are shut, as in diffusers'
        PAG of SD3. Raises GuidekitError unless queries and keys are the same tokens (N = T).
        """
        n, t = self.query.shape[2], self.key.shape[2]
        if n != t:
            raise GuidekitError(
                f"{self.site}: P = I needs self-attention, not {n} queries, {t} keys"
            )
        self._identity = rows.indices(n) == (0, n, 1)
        if not self._identity:
            shut = self.query.new_zeros(1, 1, n, n)
            shut[..., rows, rows] = float("-inf")
            shut.diagonal(dim1=-2, dim2=-1).zero_()
            self.bias(shut)

    def copied(self) -> "AttentionCall":
        """The call as it is now, to be changed or run by itself."""
        return replace(self, _extensions=[*self._extensions])

    def split(self, sizes: Sequence[int]) -> list["AttentionCall"]:
        """The call's rows as calls of their own, `sizes` after one another along the batch.

        For a call that nothing has changed yet. Rows never attend to each other, so the outputs,
        concatenated, are the whole call's.
        """
        # One backward of `split` joins the gradients; that of slices would add padded ones.
        parts = [tensor.split(list(sizes)) for tensor in (self.query, self.key, self.value)]
        own = self.mask is not None and self.mask.ndim == 4 and len(self.mask) == len(self.query)
        masks = self.mask.split(list(sizes)) if own else [self.mask] * len(sizes)
        return [
            AttentionCall(
                self.site,
                self.module,
                self.index,
                query,
                key,
                value,
                mask,
                self.scale,
                self.is_causal,
                self.dropout_p,
                self.enable_gqa,
                self.implementation,
            )
            for query, key, value, mask in zip(*parts, masks, strict=True)
        ]

    def state(self) -> tuple:
        """All that an edit can change, to be compared by identity."""
        return (
            self.query,
            self.key,
            self.value,
            self.mask,
            self.scale,
            self._identity,
            len(self._extensions),
        )

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
        self.made = self._extended(out)
        return self.made

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


def _check_plain(call: AttentionCall) -> None:
    """Denoisers attend without causality and dropout, and maps do not have them."""
    if call.is_causal or call.dropout_p:
        raise GuidekitError(f"{call.site}: no maps of a causal call or of one with dropout")


def _read_mask(call: AttentionCall) -> Tensor | None:
    _check_plain(call)
    return call.mask


def _run_sdpa(call: AttentionCall) -> Tensor:
    return F.scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=call.mask,
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
        logits, _, _ = logits_of(call.query, call.key, mask, scale, slice(0, h), slice(None))
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
        mask = masked(torch.zeros_like(mask, dtype=call.query.dtype), mask)
        mask = mask.expand(*call.query.shape[:3], key.shape[2])
    q, k, v = (t.transpose(1, 2) for t in (call.query, key, value))
    return memory_efficient_attention(q, k, v, attn_bias=mask, scale=call.scale).transpose(1, 2)


_RUN = {
    "sdpa": _run_sdpa,
    "auto": _run_sdpa,
    "triton": _run_sdpa,  # without maps its kernel has nothing over stock SDPA
    "eager": lambda call: _eager(call)[0],
    "xformers": _run_xformers,
}


def attend(
    call: AttentionCall,
    weights: Tensor,
    implementation: str | None = None,
    rows: slice | None = None,
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Output and maps of one call: (B, H, N, d) and what `token_maps` returns.

    eager   materialises P and lets autograd keep it; the reference.
    sdpa    stock SDPA with `weights` appended to V as columns (the output within rounding of the
            untouched call). In half precision P and each head's map are rounded; heads and copies
            of the map are summed in fp32.
    triton  the kernel of `guidekit_kernels`, where it takes the call (frozen keys, at most 128 of
            them, half precision); else sdpa.
    None means `call.implementation`, which afterwards names the one that ran. Raises GuidekitError
    for xformers, which returns no maps, and RuntimeError for one that is not available here.

    Measured on one CPU core, fp32, S = 4, forward and backward to the query in ms (and MiB
    saved), for SDPA alone, eager, appended, SDPA with token_maps. H8 N4096 T77 d40: 28 (10),
    23 (10), 32 (12), 51 (11); H4 N = T = 1100 d64, all gradients: 55 (4), 68 (26), 64 (5), 109 (9).
    """
    name = choose(implementation) if implementation else call.implementation
    if name == "auto":  # the table of times is not for compiled denoisers
        name = "sdpa" if torch.compiler.is_compiling() else automatic(call.query, call.key)
    if name == "triton" and importlib.import_module(KERNELS).lacks(
        call.query, call.key, call.value, weights, call.mask
    ):
        name = "sdpa"
    call.implementation = name
    rows = slice(None) if rows is None else rows
    if name == "xformers":
        raise GuidekitError("xformers returns no maps; read with: eager, sdpa, triton")
    if call._identity:
        return call.run(), call.read(weights, rows, reduce)
    out, maps = _ATTEND[name](call, weights, rows, reduce)
    return call._extended(out), maps


def _attend_eager(call, weights, rows, reduce) -> tuple[Tensor, Tensor]:
    out, p = _eager(call)
    with torch.autocast(p.device.type, enabled=False):
        maps = (p[:, :, rows] @ weights.to(p.dtype)[:, None]).transpose(-1, -2)
    return out, maps.mean(1) if reduce == "mean" else maps


def _attend_sdpa(call, weights, rows, reduce) -> tuple[Tensor, Tensor]:
    """P @ [V | weights]; zeros keep the sizes equal, without which the CPU has no flash kernel."""
    query, key, value, mask = _autocast(call)
    half = value.dtype in (torch.float16, torch.bfloat16)
    columns, size = _copied(weights) if half else (weights, None)
    d, s = query.shape[-1], columns.shape[-1]
    extra = -(-s // 8) * 8  # alignment for the CUDA kernels
    columns = F.pad(columns.to(value.dtype), (0, extra - s))[:, None]
    with torch.autocast(query.device.type, enabled=False):
        both = F.scaled_dot_product_attention(
            F.pad(query, (0, extra)),
            F.pad(key, (0, extra)),
            torch.cat([value, columns.expand(*value.shape[:3], extra)], -1),
            attn_mask=mask,
            scale=d**-0.5 if call.scale is None else call.scale,
            enable_gqa=call.enable_gqa,
        )
    return both[..., :d], _averaged(both[:, :, rows, d : d + s].mT, size, reduce)


def _attend_triton(call, weights, rows, reduce) -> tuple[Tensor, Tensor]:
    columns, size = _units(weights)
    out, maps = importlib.import_module(KERNELS).attend(
        call.query, call.key, call.value, columns, _read_mask(call), call.scale, rows, "none"
    )
    return out, _averaged(maps, size[:, None], reduce)


def _autocast(call: AttentionCall) -> list[Tensor | None]:
    """Query, key, value and mask in autocast's dtype where it is on, as SDPA takes them."""
    given, device = [call.query, call.key, call.value, _read_mask(call)], call.query.device.type
    if not torch.is_autocast_enabled(device):
        return given
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype in _KEPT else x.to(dtype) for x in given]


def _units(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights with a largest value of 1 in each column, and what they were divided by (B, S, 1).

    Those of a token or of a segment's average are then 0 and 1, which halves hold exactly.
    """
    size = torch.linalg.vector_norm(weights, torch.inf, 1, keepdim=True)
    size = size.clamp(min=torch.finfo(size.dtype).tiny)
    return weights / size, size.mT


def _copied(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (B, T, C * S) of C copies of `_units`, and by what to multiply each map (B, C, S, 1).

    SDPA rounds what it writes; the mean of copies of other sizes, which are rounded at other
    places, is nearer. They fill 16 columns, which are free where a kernel takes heads of 64, 96,
    128. Sizes are eighths from 1 to 2, exact in bf16.
    """
    columns, size = _units(weights)
    copies = min(8, max(1, 16 // max(1, weights.shape[-1])))
    sizes = 1 + (torch.arange(copies, device=weights.device)[:, None] * 8 // copies) / 8
    return (columns[:, :, None] * sizes).flatten(2), size[:, None] / (copies * sizes[..., None])


def _averaged(maps: Tensor, size: Tensor | None, reduce: str) -> Tensor:
    """Maps (B, H, C * S, rows), over heads and C copies, in fp32 or better.

    size: by what to multiply the maps (B, C, S, 1), None for those of the weights themselves.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    maps = maps.mean(1, keepdim=True) if reduce == "mean" else maps
    if size is not None:
        maps = (maps.unflatten(2, size.shape[1:3]) * size[:, None]).sum(2)
    return maps.squeeze(1) if reduce == "mean" else maps


_KEPT = (torch.float64, torch.bool)  # of autocast
_ATTEND = {"eager": _attend_eager, "sdpa": _attend_sdpa, "triton": _attend_triton}
