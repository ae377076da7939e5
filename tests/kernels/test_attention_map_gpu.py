"""The attention kernels on a CUDA device, in both halves, at the sizes of real denoisers."""

import os

# Deterministic mode, which fills new tensors with nan, asks it of the references' products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from attention_map_cases import Case, check, seed_of
from guidekit.attention import call as attention
from guidekit.attention.choice import implementations
from guidekit.taps import tap_attention
from guidekit_kernels.attention_map import attend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

MASKS = ("pixart keys", "boolean keys", "boolean rows", "additive rows", "additive all")
CASES = [
    *(Case(n=300, t=t, d=d) for d in (40, 64, 72, 80, 128, 160) for t in (1, 77)),
    *(Case(b=2, n=200, t=77, d=64, mask=mask) for mask in MASKS),
    *(Case(n=200, t=77, d=72, layout=layout) for layout in ("odd", "columns")),
    *(Case(n=200, t=77, unused=unused) for unused in ("out", "maps")),
    Case(b=8, h=20, n=1024, t=77, d=64, batched=True, reduce="none"),
    Case(n=1, t=2, h=8, b=4),
    Case(n=200, t=77, s=20, rows=(7, 90)),
]


@pytest.fixture(autouse=True)
def nan_in_new_tensors():
    """`empty` fills with nan: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def right_kernels():
    if (state := implementations()["triton"]) != "available":
        pytest.fail(f"the kernels are refused: {state}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case, dtype):
    check(case, dtype, "cuda", seed=seed_of(case, dtype))


def test_compile_keeps_one_graph():
    q, k, v = (torch.randn(1, 2, n, 64, device="cuda").bfloat16() for n in (256, 77, 77))
    weights, q = torch.ones(1, 77, 3, device="cuda"), q.requires_grad_()

    def loss(q):
        out, maps = attend(q * 2, k, v, weights)
        return out.float().square().sum() + maps.square().sum()

    expected = torch.autograd.grad(loss(q), q)
    given = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q), q)
    torch.testing.assert_close(given, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_inside_a_model_of_real_size(name, dtype):
    """SD 1.5's UNet with random weights: output, maps and gradient are near those of fp32."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).requires_grad_(False)
    truth = _run(unet, "eager", torch.float32)
    errors = {kind: _errors(_run(unet.to(dtype), kind, dtype), truth) for kind in ("eager", name)}
    for ours, eagers in zip(errors[name], errors["eager"], strict=True):
        assert ours <= 2 * eagers + 1e-3, errors


def _run(unet, implementation: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, the maps of two tokens at every cross-attention, and their gradient to the image."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *s: torch.randn(s, generator=generator, device="cuda").to(dtype)  # noqa: E731
    x, text, maps = draw(2, 4, 64, 64).requires_grad_(), draw(2, 77, 768), []
    weights = torch.zeros(1, 77, 2, device="cuda")
    weights[0, 1, 0] = weights[0, 2:5, 1] = 1

    def read(call):
        out, found = attention.attend(call, weights)
        assert call.implementation == implementation
        maps.append(found.flatten().float())
        return out

    with tap_attention(unet, read, "*.attn2", implementation=implementation):
        out = unet(x, 500, text, return_dict=False)[0]
    maps = torch.cat(maps)
    (grad,) = torch.autograd.grad(maps.square().sum() + out.float().mean(), x)
    return [out.detach(), maps.detach(), grad]


def _errors(found: list[torch.Tensor], true: list[torch.Tensor]) -> list[float]:
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, true, strict=True)]
