"""The vendor's route of joint attention against softmax in memory, on the CPU's flash kernels."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from attention_map_cases import poisoned
from guidekit_kernels import attention_map_joint as joint
from guidekit_kernels import reference

COLUMNS = torch.tensor([9, 2, 3])


def drawn(dtype=torch.float32, layout="heads last", n=40, t=48, d=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, size, d) for size in (n, t, t)]
    tensors = [poisoned(s, layout, dtype, "cpu", generator) for s in shapes]
    weights = torch.zeros(1, t, 2, dtype=torch.float64)
    weights[0, 9, 0], weights[0, 2:4, 1] = 1, 0.5
    return tensors, weights.to(dtype), generator


def gradients(attention, tensors, weights, incoming, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = attention(*leaves, weights.to(leaves[0].dtype), **options)
    pairs = [(r, g.to(r)) for r, g in zip(results, incoming, strict=True) if g is not None]
    used, given = zip(*pairs, strict=True)
    grads = torch.autograd.grad(used, leaves, given, materialize_grads=True)
    return [*(r.detach() for r in results), *grads]


def size(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["heads last", "odd"])
@pytest.mark.parametrize("unused", ["", "out", "maps"])
def test_equals_materialised_softmax(dtype, layout, unused):
    """Twice the error of torch in the same dtype; see `attention_map_cases.check`."""
    tensors, weights, generator = drawn(dtype, layout, seed=torch.seed() % 2**31)
    noise = [torch.randn(s, generator=generator) for s in ((2, 3, 40, 16), (2, 2, 29))]
    incoming = [None if unused == "out" else noise[0], None if unused == "maps" else 30 * noise[1]]
    options = dict(scale=0.3, rows=slice(11, None))
    wide = [x.double() for x in tensors]
    truth = gradients(reference.attention_map, wide, weights, incoming, **options)
    same = gradients(reference.attention_map, tensors, weights, incoming, **options)
    ours = gradients(joint.attend, tensors, weights, incoming, **options)
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    for given, torchs, true in zip(ours, same, truth, strict=True):
        assert given.shape == true.shape
        allowed = 2 * size(torchs.double() - true) + floor * size(true)
        assert size(given.double() - true) <= allowed


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_gradients_in_float64(reduce):
    tensors, weights, _ = drawn(torch.float64, n=5, t=12, d=4)
    leaves = [x.contiguous().requires_grad_() for x in tensors]

    def both(*leaves):
        return joint.attend(*leaves, weights, COLUMNS, rows=slice(1, 4), reduce=reduce)

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [0.0, 1e-30, 1e-4])
def test_queries_whose_output_has_next_to_no_gradient(dtype, strength):
    """The row sums enter through dO: rows of it that vanish are replaced."""
    tensors, weights, generator = drawn(dtype)
    out = torch.randn(2, 3, 40, 16, generator=generator)
    out[:, :, ::2] *= strength
    incoming = [out, torch.randn(2, 2, 40, generator=generator)]
    truth = gradients(reference.attention_map, [x.double() for x in tensors], weights, incoming)
    ours = gradients(joint.attend, tensors, weights, incoming)
    near = 2e-6 if dtype == torch.float32 else 1e-2
    for given, true in zip(ours, truth, strict=True):
        assert size(given - true) <= near * size(true)


def test_row_sums():
    grad, out, value = (torch.randn(1, 1, 6, 8) for _ in range(3))
    extra = torch.tensor([[[0.0, 1.0, -3.0, 0.0, 2.0, 1e-3]]])
    grad[0, 0, 3:] *= torch.tensor([[0.0], [0.0], [1e-12]])
    given, changed = joint.with_row_sums(grad, out, extra, value)
    sums = (given.double() * changed.double()).sum(-1)
    torch.testing.assert_close(sums, (grad * out).sum(-1).double() + extra, rtol=2e-6, atol=2e-6)
    assert torch.equal(given[0, 0, :4], grad[0, 0, :4])
    assert torch.equal(changed[0, 0, [0, 3]], out[0, 0, [0, 3]])


def test_compile_keeps_one_graph():
    tensors, weights, _ = drawn()

    def loss(q, k, v):
        out, maps = joint.attend(q * 2, k, v, weights, COLUMNS)
        return out.square().sum() + maps.square().sum()

    leaves = [x.detach().requires_grad_() for x in tensors]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_autocast_rounds_the_inputs_alone():
    """Forward and backward: maps and their gradients are sums in fp32."""
    tensors, weights, generator = drawn()
    halves = [x.bfloat16() for x in tensors]
    incoming = [torch.randn(s, generator=generator) for s in ((2, 3, 40, 16), (2, 2, 40))]
    expected = gradients(joint.attend, halves, weights, incoming)
    with torch.autocast("cpu", torch.bfloat16):
        given = gradients(joint.attend, tensors, weights, incoming)
    assert given[0].dtype == torch.bfloat16 and given[1].dtype == torch.float32
    assert torch.equal(given[1], expected[1])
    for ours, theirs in zip(given[2:], expected[2:], strict=True):
        assert torch.equal(ours.bfloat16(), theirs)


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_the_gpus_kernels_take_these_arguments(name):
    """By torch's own shape functions; the numbers are tested on a GPU."""
    with FakeTensorMode():
        q, k, v = (
            torch.empty(1, n, 3, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
            for n in (40, 48, 48)
        )
        out, lse, *rest = joint._FORWARD[name](q, k, v, 0.1)
        assert out.shape == q.shape and lse.numel() == 3 * 40 and lse.dtype == torch.float32
        grads = joint._BACKWARD[name](out, q, k, v, out, lse, rest, 0.1)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_refusals():
    (q, k, v), weights, _ = drawn()
    with pytest.raises(ValueError, match="as many key heads.*attention_map.attend takes more"):
        joint.attend(q, k[:, :1], v[:, :1], weights)
    with pytest.raises(ValueError, match="detach them"):
        joint.attend(q, k, v, weights.requires_grad_())
    assert joint.vendor(q, k, v, torch.zeros(1))[1] == "takes no mask"
    assert joint.vendor(q.half(), k.half(), v.half()) == (None, "has no fp16")
    assert "one dtype" in joint.vendor(q, k.bfloat16(), v)[1]
    assert "adjacent" in joint.vendor(q.mT.contiguous().mT, k, v)[1]
