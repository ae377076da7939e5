"""Cases of `attention_map` and the check that they pass, for the interpreter and for a GPU."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit_kernels import reference
from guidekit_kernels.attention_map import attend


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; `mask` names how it is drawn."""

    b: int = 1
    h: int = 2
    n: int = 40
    t: int = 20
    d: int = 40
    s: int = 3
    batched: bool = False  # weights per image
    mask: str = "none"
    scale: float | None = None
    rows: tuple = (None,)
    reduce: str = "mean"
    layout: str = "heads last"
    unused: str = ""  # the result that gets no gradient: "out" or "maps"


def poisoned(shape: tuple[int, ...], layout: str, dtype, device, generator) -> Tensor:
    """Normal numbers in a buffer that is nan everywhere else."""
    b, h, n, d = shape
    if layout == "heads last":  # the projections' (B, N, H, d), a slice of a fused one
        buffer = torch.full((b, n + 3, h, 2 * d + 8), torch.nan, dtype=dtype, device=device)
        part = buffer[:, 1 : n + 1, :, 8 : d + 8].transpose(1, 2)
    elif layout == "odd":  # no stride divides by two
        buffer = torch.full((b, h, n + 3, d + 1), torch.nan, dtype=dtype, device=device)
        part = buffer[:, :, 1 : n + 1, :d]
    else:  # "columns": the last stride is not 1
        buffer = torch.full((b, h, d, n + 3), torch.nan, dtype=dtype, device=device)
        part = buffer[..., :n].transpose(2, 3)
    return part.copy_(torch.randn(shape, generator=generator))


def drawn_mask(case: Case, dtype, generator) -> Tensor | None:
    """A mask in the forms that denoisers and Paint-with-Words pass."""
    b, h, n, t = case.b, case.h, case.n, case.t
    shape = {"keys": (b, 1, 1, t), "heads": (b, h, 1, t), "rows": (b, 1, n, t), "all": (1, h, n, t)}
    if case.mask == "none":
        return None
    kind, form = case.mask.split(" ")
    if kind == "boolean":
        mask = torch.rand(shape[form], generator=generator) > 0.4
        mask[..., 0] = True
        if form == "rows":
            mask[..., -1, :] = False  # a query that may attend to nothing
        return mask
    mask = torch.randn(shape[form], generator=generator)
    if kind == "pixart":  # 0 for words, -10000 for padding
        mask = torch.where(mask > 0, 0.0, -10000.0)
    if kind == "lowest":  # transformers' padding; the last image has nothing else
        mask = torch.where(mask > 0, 0.0, torch.finfo(dtype).min)
        mask[-1] = torch.finfo(dtype).min
    return mask.to(dtype)


def seed_of(case: Case, dtype: torch.dtype) -> int:
    """A case's own seed: the same numbers in every run, others in every case."""
    return zlib.crc32(f"{case} {dtype}".encode())


def check(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0, floor=4e-7) -> None:
    """Output, maps and gradients against float64, within twice the error of torch in `dtype`.

    The error is the root mean square over the tensor: the largest of a few thousand rounding
    errors varies by half from seed to seed, for torch as for the kernel, and fails an honest run
    now and then. So that no single wrong number hides in the mean, the largest error may be
    four times torch's largest. `floor` is allowed besides, as a part of the truth's own size: torch
    may make no error at all. Where one key has all the attention the gradient of the queries is
    zero, as a difference of terms of the output's size: that is the size there. In halves the
    kernel rounds P, where torch's reference rounds the maps' inputs in the same dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(case.b, case.h, case.n, case.d)] + [(case.b, case.h, case.t, case.d)] * 2
    tensors = [poisoned(s, case.layout, dtype, device, generator) for s in shapes]
    weights = torch.rand(case.b if case.batched else 1, case.t, case.s, generator=generator)
    weights = (weights > 0.5).float().to(device)
    options = dict(scale=case.scale, rows=slice(*case.rows), reduce=case.reduce)
    mask = drawn_mask(case, dtype, generator)
    options["mask"] = None if mask is None else mask.to(device)
    noise = torch.Generator()
    wide = [x.double() for x in tensors]
    ours = _results(attend, tensors, weights, options, case, noise)
    truth = _results(reference.attention_map, wide, weights, options, case, noise)
    same = _results(reference.attention_map, tensors, weights, options, case, noise)
    for name in truth:
        assert ours[name].shape == truth[name].shape
        terms = truth["out" if case.t == 1 and name == "grad" else name]
        for size, times in ((_root_mean_square, 2), (_largest, 4)):
            error, torchs = (size(x[name].double() - truth[name]) for x in (ours, same))
            allowed = times * torchs + floor * max(size(truth[name]), size(terms))
            assert error <= allowed, f"{name}, {size.__name__}: {error:.1e} > {allowed:.1e}"


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _results(attention, tensors, weights, options, case, noise) -> dict[str, Tensor]:
    """Output, maps and the query's gradient for incoming ones that are the same for every call."""
    noise.manual_seed(1)
    query, key, value = (x.detach() for x in tensors)
    results = dict(
        zip(
            ("out", "maps"),
            attention(query.requires_grad_(), key, value, weights, **options),
            strict=True,
        )
    )
    incoming = {
        name: (size * torch.randn(results[name].shape, generator=noise)).to(results[name])
        for name, size in (("out", 1), ("maps", 30))
        if name != case.unused
    }
    used = [results[name] for name in incoming]
    (grad,) = torch.autograd.grad(used, query, list(incoming.values()))
    return {name: x.detach() for name, x in (results | dict(grad=grad)).items()}
