"""Are the kernels right on this machine? `python -m guidekit_kernels.check` exits with 1 if not.

Run as a process of its own: after a fault in a kernel no call on the GPU succeeds in that process.
"""

import sys

import torch
from torch import Tensor

from guidekit_kernels import reference
from guidekit_kernels.attention_map import attend

# Keys, head size, and whether there is a mask, a vector of PixArt's kind: every tile of few keys in
# halves, and several blocks.
FEW = ((77, 32, False), (77, 64, False), (77, 128, False), (77, 160, False))
CASES = {
    torch.bfloat16: (*FEW, (300, 72, True)),
    torch.float16: FEW,
    torch.float32: ((77, 64, False),),
}
ALLOWED = 0.03  # error of a tensor over its size, by their norms; bf16 alone makes up to 0.01


def results(attention, tensors: list[Tensor], weights: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Output, maps and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, maps = attention(*leaves, weights, mask=mask)
    generator = torch.Generator(out.device).manual_seed(1)
    given = [
        (torch.randn(x.shape, generator=generator, device=x.device) * size).to(x)
        for x, size in ((out, 1), (maps, 30))
    ]
    return [x.detach() for x in (out, maps, *torch.autograd.grad([out, maps], leaves, given))]


def worst(t: int, d: int, masked: bool, dtype: torch.dtype, device: str) -> float:
    """Largest error of a case over the truth's size."""
    generator = torch.Generator().manual_seed(t + d)
    shapes = (1, 2, 300, d), (1, 2, t, d), (1, 2, t, d)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    weights = torch.rand(1, t, 3, generator=generator).to(device)
    hidden = torch.rand(1, 1, 1, t, generator=generator) > 0.7
    mask = torch.where(hidden, -10000.0, 0.0).to(device, dtype) if masked else None
    ours = results(attend, tensors, weights, mask)
    truth = results(reference.attention_map, [x.double() for x in tensors], weights, mask)
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(ours, truth, strict=True)]
    return float(torch.stack(errors).max())  # of torch: Python's passes nan over


def complaint(device: str) -> str:
    """What is wrong, or nothing."""
    for dtype, cases in CASES.items():
        for case in cases:
            if not (error := worst(*case, dtype, device)) <= ALLOWED:  # so that nan is wrong
                t, d, _ = case
                return f"{t} keys of size {d} in {str(dtype)[6:]} are off by {error:.2g}"
    return ""


if __name__ == "__main__":
    text = complaint("cuda")
    print(text or "right")
    sys.exit(1 if text else 0)
