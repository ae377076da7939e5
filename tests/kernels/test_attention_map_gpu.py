"""The attention kernels on a CUDA device, in every dtype, at the sizes of real denoisers."""

import os

# Deterministic mode, which fills new tensors with nan, asks it of the references' products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from attention_map_cases import Case, check
from guidekit_kernels import attention_map_joint as joint
from guidekit_kernels import reference
from guidekit_kernels.attention_map import attend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CASES = [
    *(Case(n=300, t=t, d=d) for d in (32, 40, 64, 72, 80, 96, 128, 160) for t in (1, 77, 300)),
    *(Case(b=2, h=4, hk=2, n=200, t=t, d=64, reduce="none") for t in (77, 300)),
    *(
        Case(b=2, n=200, t=t, d=64, mask=mask, bias=bias)
        for t in (77, 300)
        for mask in ("none", "pixart keys", "boolean keys", "boolean rows", "additive all")
        for bias in (False, True)
    ),
    *(Case(n=200, t=t, d=72, layout=layout) for t in (77, 300) for layout in ("odd", "columns")),
    *(Case(n=200, t=t, unused=unused) for t in (77, 300) for unused in ("out", "maps")),
    *(Case(n=200, t=t, d=64, grads=grads) for t in (77, 300) for grads in ("", "q")),
    Case(n=1, t=2, h=8, b=4),
    Case(b=2, n=200, t=300, d=64, mask="lowest keys"),
    Case(n=64, t=20, h=70_000, d=32, grads="q"),  # more heads than a grid's second dimension
    Case(n=600, t=600, d=128, rows=(88, 600), keys=(0, 88)),
    Case(n=600, t=600, d=64, rows=(0, 512), keys=(512, 600)),
    Case(n=16384 + 3, t=77, h=1, d=40),
    Case(n=1000, t=8192, h=1, d=64),
]


@pytest.fixture(autouse=True)
def nan_in_new_tensors():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case, dtype):
    check(case, dtype, "cuda", seed=int.from_bytes(os.urandom(3)))


@pytest.mark.parametrize("cudnn", [False, True], ids=["flash", "cudnn"])
@pytest.mark.parametrize("unused", ["", "out", "maps"])
def test_the_vendors_route(cudnn, unused):
    """Joint attention of SD 3's sizes in bf16: at most twice the error of torch's own."""
    generator = torch.Generator().manual_seed(0)
    shape, columns = (1, 4, 1024 + 154, 64), torch.tensor([3, 7, 100], device="cuda")
    tensors = [torch.randn(shape, generator=generator) for _ in range(3)]
    weights = torch.zeros(1, shape[2], 2)
    weights[0, 3, 0], weights[0, [7, 100], 1] = 1, 0.5
    incoming = torch.randn(shape, generator=generator), 30 * torch.randn(1, 2, 1024)

    def results(attention, dtype, **options):
        leaves = [x.to("cuda", dtype).requires_grad_() for x in tensors]
        wide = torch.promote_types(dtype, torch.float32)
        out, maps = attention(*leaves, weights.to("cuda", wide), rows=slice(154, None), **options)
        parts = [("out", out, incoming[0]), ("maps", maps, incoming[1])]
        kept = [(x, g.to(x)) for name, x, g in parts if name != unused]
        used, given = zip(*kept, strict=True)
        grads = torch.autograd.grad(used, leaves, given, materialize_grads=True)
        return [x.detach().double() for x in (out, maps, *grads)]

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        given = results(joint.attend, torch.bfloat16, columns=columns)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    truth, same = (results(reference.attention_map, x) for x in (torch.float64, torch.bfloat16))
    for ours, torchs, true in zip(given, same, truth, strict=True):
        assert (ours - true).norm() <= 2 * (torchs - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("t", [77, 300])
def test_tf32(t):
    """References and kernels both use tf32."""
    torch.set_float32_matmul_precision("high")
    try:
        check(Case(n=200, t=t, d=64, bias=True), torch.float32, "cuda", floor=1e-3)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("t", [77, 300])
def test_compile_keeps_one_graph(t):
    q, k, v = (torch.randn(1, 2, n, 64, device="cuda").requires_grad_() for n in (256, t, t))
    weights = torch.rand(1, t, 3, device="cuda")

    def loss(q, k, v):
        out, maps = attend(q * 2, k, v, weights)
        return out.square().sum() + maps.square().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    given = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
