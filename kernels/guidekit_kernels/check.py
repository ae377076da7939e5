"""Are the kernels right on this machine? `python -m guidekit_kernels.check` exits with 1 if not.

Run as a process of its own: after a fault in a kernel no call on the GPU succeeds in that process.
A pass is remembered by `record`.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit_kernels import ptxas, reference, tiles
from guidekit_kernels.attention_map import attend
from guidekit_kernels.record import passed


@dataclass(frozen=True)
class Case:
    """One call with 77 keys; mask: none, a boolean vector of keys, or a bias with rows."""

    d: int
    h: int
    mask: str
    dtype: torch.dtype
    n: int = 1000
    b: int = 8


CASES = (
    Case(40, 20, "none", torch.bfloat16),
    Case(64, 20, "rows", torch.bfloat16),
    Case(80, 2, "keys", torch.bfloat16),
    Case(128, 20, "rows", torch.bfloat16),
    Case(160, 2, "none", torch.bfloat16),
    Case(40, 2, "rows", torch.float16),
    Case(64, 20, "none", torch.float16),
    Case(80, 20, "rows", torch.float16),
    Case(128, 2, "keys", torch.float16),
    Case(160, 2, "rows", torch.float16),
)
KEYS = 77
ALLOWED = 0.03  # error of a tensor over its size, by their norms; bf16 alone makes up to 0.01


def drawn(case: Case, device: str) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Query, key and value, weights of two tokens and a segment, and the mask."""
    generator = torch.Generator().manual_seed(case.d + case.h)
    tensors = [
        torch.randn(case.b, size, case.h, case.d, generator=generator)
        for size in (case.n, KEYS, KEYS)
    ]
    tensors = [x.to(device, case.dtype).transpose(1, 2) for x in tensors]
    weights = torch.zeros(1, KEYS, 3, device=device)
    weights[0, 5, 0] = weights[0, 76, 1] = weights[0, 20:26, 2] = 1
    if case.mask == "keys":
        mask = torch.rand(case.b, 1, 1, KEYS, generator=generator) > 0.3
        return tensors, weights, mask.to(device)
    mask = 2 * torch.rand(case.b, 1, case.n, KEYS, generator=generator)
    return tensors, weights, mask.to(device, case.dtype) if case.mask == "rows" else None


def results(attention, tensors: list[Tensor], weights: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Output, maps and the query's gradient of both."""
    query, key, value = (x.detach() for x in tensors)
    out, maps = attention(query.requires_grad_(), key, value, weights, mask=mask)
    generator = torch.Generator(out.device).manual_seed(1)
    given = [
        (torch.randn(x.shape, generator=generator, device=x.device) * size).to(x)
        for x, size in ((out, 1), (maps, 30))
    ]
    return [x.detach() for x in (out, maps, *torch.autograd.grad([out, maps], query, given))]


def worst(case: Case, device: str) -> float:
    """Largest error of a case over the truth's size."""
    tensors, weights, mask = drawn(case, device)
    ours = results(attend, tensors, weights, mask)
    truth = results(reference.attention_map, [x.double() for x in tensors], weights, mask)
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(ours, truth, strict=True)]
    return float(torch.stack(errors).max())  # of torch: Python's passes nan over


def complaint(device: str, cases=CASES) -> str:
    """What is wrong, or nothing."""
    most = tiles.max_head(torch.device(device))
    for case in cases:
        if case.d <= most and not (error := worst(case, device)) <= ALLOWED:  # so that nan is wrong
            about = f"heads of {case.d} in {str(case.dtype)[6:]}, {case.h} heads, mask {case.mask}"
            return f"{about}, are off by {error:.2g}"
    return ""


def main() -> int:
    """Checks on the first GPU, remembers a pass, and says what is wrong."""
    there = torch.cuda.is_available()
    text = (ptxas.fault() or complaint("cuda")) if there else "no CUDA device"
    print(text or "right")
    if not text:
        passed().parent.mkdir(parents=True, exist_ok=True)
        passed().write_text("right\n")
    return 1 if text else 0


if __name__ == "__main__":
    sys.exit(main())
