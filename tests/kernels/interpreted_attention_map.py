"""Numbers of the attention kernels in Triton's interpreter.

Run by `test_attention_map` in a process of its own: TRITON_INTERPRET is read when a kernel is
decorated. bf16 products are wrong in the interpreter; they are tested on a GPU.
"""

import os

import pytest
import torch

from attention_map_cases import Case, check, seed_of
from guidekit_kernels import check as own_check
from guidekit_kernels.attention_map import attend, attention_map, padded_bias, padded_weights

assert os.environ["TRITON_INTERPRET"] == "1", "run through tests/kernels/test_attention_map.py"

CASES = [
    Case(d=40, t=77, n=150),
    Case(d=64, t=33, b=2, batched=True, reduce="none"),
    Case(d=72, t=1),
    Case(d=80, t=128, s=9, rows=(5, 31)),
    Case(d=96, n=1, t=2, h=3, b=2),
    Case(d=128, t=40, n=70),
    Case(d=160, t=17, h=3),
    Case(s=20),
    Case(mask="pixart keys", b=2),
    Case(mask="boolean rows", b=2),
    Case(mask="boolean keys", layout="odd"),
    Case(mask="additive all"),
    Case(mask="additive heads", n=150),
    Case(mask="additive rows", b=2, n=150, t=77),
    Case(mask="lowest keys", b=2),
    Case(unused="out"),
    Case(unused="maps"),
    Case(layout="columns", scale=0.3),
]


@pytest.fixture(autouse=True)
def nan_in_new_tensors():
    """`empty` fills with nan: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case, dtype):
    check(case, dtype, seed=seed_of(case, dtype))


def test_bf16_is_computed_in_fp32_here():
    check(Case(t=33), torch.bfloat16)


def inputs(n=16, t=20, d=40, dtype=torch.float32):
    """Query with gradient, key, value and 0/1 weights of three maps."""
    q, k, v = (torch.randn(1, 2, size, d).to(dtype) for size in (n, t, t))
    return q.requires_grad_(), k, v, (torch.rand(1, t, 3) > 0.5).float()


def test_all_keys_together_have_one():
    """W's zeros and ones are exact; the sum of a row of rounded P is off by its rounding alone."""
    *tensors, _ = inputs(dtype=torch.float16)
    _, maps = attend(*tensors, torch.ones(1, 20, 1))
    torch.testing.assert_close(maps, torch.ones(1, 1, 16), rtol=1e-3, atol=0)


def test_two_runs_are_equal_bit_for_bit():
    q, k, v, weights = inputs()
    runs = []
    for _ in range(2):
        out, maps = attend(q, k, v, weights)
        (grad,) = torch.autograd.grad(out.sum() + maps.square().sum(), q)
        runs.append((out, maps, grad))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("options", [{}, {"reduce": "none"}, {"rows": slice(3, 9)}], ids=str)
def test_compile_keeps_one_graph(options):
    q, k, v, weights = inputs()

    def loss(q):
        out, maps = attend(q * 2, k, v, weights, **options)
        return out.square().sum() + maps.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(torch.autograd.grad(compiled(q), q), expected)


def test_registration():
    """Schema, fake results and autograd of the operator, by torch's own check."""
    q, k, v, weights = inputs()
    padded = padded_weights(weights, q), padded_bias(None, q, 20)
    torch.library.opcheck(attention_map, (q, k, v, *padded, 0.2, 3))


@pytest.mark.parametrize("out, maps", [(1, 1), (1.1, 1), (1, 1.1), (1, float("nan"))])
def test_the_check_that_users_machines_run_sees_wrong_numbers(monkeypatch, out, maps):
    def scaled(*arguments, **options):
        given = attend(*arguments, **options)
        return given[0] * out, given[1] * maps

    monkeypatch.setattr(own_check, "attend", scaled)
    case = own_check.Case(40, 2, "rows", torch.float16, n=40, b=1)
    told = own_check.complaint("cpu", [case])
    assert told == "" if out == maps == 1 else told.startswith("heads of 40 in float16")
