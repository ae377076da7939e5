"""Cases of `attention_map` and the check that they pass, for the interpreter and for a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit_kernels import reference
from guidekit_kernels.attention_map import attend


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; `mask` and `bias` name how they are drawn."""

    b: int = 1
    h: int = 2
    hk: int | None = None
    n: int = 40
    t: int = 20
    d: int = 32
    s: int = 3
    batched: bool = False  # weights per image
    mask: str = "none"
    bias: bool = False
    scale: float | None = None
    rows: tuple = (None,)
    keys: tuple = (None,)
    reduce: str = "mean"
    layout: str = "heads last"
    grads: str = "qkv"
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
    """A mask in the forms that denoisers pass."""
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


def check(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0, floor=4e-7) -> None:
    """Output, maps and gradients against float64, within twice the error of torch in `dtype`.

    The error is the root mean square over the tensor: the largest of a few thousand rounding
    errors varies by half from seed to seed, for torch as for the kernel, and fails an honest run
    now and then. So that no single wrong number hides in the mean, the largest error may be
    four times torch's largest. `floor` is allowed besides, as a part of the truth's own size: torch
    may make no error at all. Where one key has all the attention, the gradients of queries and keys
    are zero, as differences of terms of the size of the value's gradient: theirs is the size there.
    """
    generator = torch.Generator().manual_seed(seed)
    hk = case.hk or case.h
    shapes = [(case.b, case.h, case.n, case.d)] + [(case.b, hk, case.t, case.d)] * 2
    tensors = [poisoned(s, case.layout, dtype, device, generator) for s in shapes]
    weights = torch.rand(case.b if case.batched else 1, case.t, case.s, generator=generator)
    within = torch.zeros(case.t, 1)
    within[slice(*case.keys)] = 1
    options = dict(scale=case.scale, rows=slice(*case.rows), reduce=case.reduce)
    options["mask"] = drawn_mask(case, dtype, generator)
    if case.bias:
        segments = (torch.rand(case.b, 4, case.n, generator=generator) > 0.5).float()
        options["bias"] = segments, 2 * torch.rand(1, case.t, 4, generator=generator)
    weights, options = _moved((weights * within, options), device)
    noise = torch.Generator().manual_seed(seed + 1)
    ranged = dict(options, keys=slice(*case.keys))
    ours = _results(attend, tensors, weights, ranged, case, noise, dtype)
    wide = [x.double() for x in tensors]
    truth = _results(reference.attention_map, wide, weights, options, case, noise, dtype)
    same = _results(reference.attention_map, tensors, weights, options, case, noise, dtype)
    for name in truth:
        assert ours[name].shape == truth[name].shape
        cancels = case.t == 1 and name in ("grad q", "grad k") and "grad v" in truth
        terms = truth["grad v" if cancels else name]
        for size, times in ((_root_mean_square, 2), (_largest, 4)):
            error, torchs = (size(x[name].double() - truth[name]) for x in (ours, same))
            allowed = times * torchs + floor * max(size(truth[name]), size(terms))
            assert error <= allowed, f"{name}, {size.__name__}: {error:.1e} > {allowed:.1e}"


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _moved(tree, device):
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), tree)


def _results(attention, tensors, weights, options, case, noise, dtype) -> dict[str, Tensor]:
    """Output, maps and gradients for incoming gradients that are the same for every call."""
    noise.manual_seed(1)
    leaves = [
        x.detach().requires_grad_(name in case.grads)
        for x, name in zip(tensors, "qkv", strict=True)
    ]
    out, maps = attention(*leaves, weights, **options)
    gradients = {
        name: (scale * torch.randn(x.shape, generator=noise)).to(dtype).to(x)
        for name, x, scale in (("out", out, 1), ("maps", maps, 30))
        if name != case.unused
    }
    results = dict(out=out, maps=maps)
    wanted = [x for x in leaves if x.requires_grad]
    if wanted:
        grads = torch.autograd.grad(
            [results[name] for name in gradients],
            wanted,
            list(gradients.values()),
            materialize_grads=True,
        )
        results |= {f"grad {name}": grad for name, grad in zip(case.grads, grads, strict=True)}
    return {name: x.detach() for name, x in results.items()}
