"""Numbers of the attention kernels in Triton's interpreter.

Run by `test_attention_map` in a process of its own: TRITON_INTERPRET is read when a kernel is
decorated. bf16 products are wrong in the interpreter; they are tested on a GPU.
"""

import functools
import os

import pytest
import torch

from attention_map_cases import Case, check
from guidekit_kernels import check as own_check
from guidekit_kernels import tiles
from guidekit_kernels.attention_map import attend, attention_map, attention_map_backward

assert os.environ["TRITON_INTERPRET"] == "1", "run through tests/kernels/test_attention_map.py"

WHOLE = [
    # one block of keys: softmax and row sum inside the dQ kernel
    Case(d=32, grads="q"),
    Case(d=40, t=33, b=2, grads="q"),
    Case(d=72, t=1),
    Case(n=1, t=2, h=8, b=4),
    Case(d=64, t=40, n=70, batched=True, b=2, reduce="none"),
    Case(d=80, t=17, s=9, rows=(5, 31), grads="q"),
    Case(d=32, h=4, hk=2, b=2),
    Case(d=32, h=3, hk=1, mask="pixart keys"),
    Case(d=32, mask="boolean rows", b=2),
    Case(d=32, mask="additive all", grads="q"),
    Case(d=32, mask="lowest keys", b=2, grads="q"),
    Case(d=32, bias=True, b=2),
    Case(d=32, unused="out"),
    Case(d=32, unused="maps"),
    Case(d=32, grads=""),
    Case(d=32, layout="odd", mask="boolean keys"),
    Case(d=32, layout="columns", scale=0.3),
    # several blocks
    Case(d=40, t=140, n=150, grads="q"),
    Case(d=64, t=150, b=2, keys=(0, 20), rows=(10, 40)),
    Case(d=64, t=260, h=1, keys=(200, 260), reduce="none"),
    Case(d=96, t=140, h=1),
    Case(d=128, t=140, h=1, layout="odd"),
    Case(d=160, t=140, h=1, grads="q"),
    Case(d=32, t=140, h=4, hk=2, mask="boolean keys"),
    Case(d=32, t=140, mask="boolean rows", b=2),
    Case(d=32, t=140, mask="additive heads", unused="out"),
    Case(d=32, t=140, mask="pixart keys", unused="maps"),
    Case(d=32, t=140, mask="lowest keys", b=2, h=1),
    Case(d=32, t=140, bias=True, b=2, mask="boolean keys"),
    Case(d=32, t=140, grads=""),
    Case(d=32, t=140, rows=(7, 7)),
    # more maps than one launch holds
    Case(d=32, s=35, grads="q"),
]


@pytest.fixture(autouse=True)
def nan_in_new_tensors():
    """`empty` fills with nan: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_numbers(case, dtype):
    check(case, dtype, seed=int.from_bytes(os.urandom(3)))


@pytest.mark.parametrize("case", [Case(t=33), Case(t=140)], ids=str)
def test_bf16_is_computed_in_fp32_here(case):
    check(case, torch.bfloat16)


@pytest.mark.parametrize("t", [20, 140])
def test_tf32_has_16_bits_in_maps_and_bias(t):
    """With tf32 allowed, the products with weights and bias are split in halves.

    The interpreter computes the large products of tf32 exactly.
    """
    torch.set_float32_matmul_precision("high")
    try:
        check(Case(t=t, bias=True), torch.float32, floor=1e-4)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("count", [1, 5, 1000])
@pytest.mark.parametrize("grads", ["", "q"])
def test_groups_of_heads_sum_to_the_same_maps(count, grads, monkeypatch):
    """Four heads in one program, two, or one; the sum over the groups has a fixed order."""
    monkeypatch.setattr(tiles, "processors", lambda device: count)
    case = Case(b=1, h=4, n=200, grads=grads)
    check(case, torch.float32)
    tile = tiles.tile("forward", 32, 20, 4, 90)
    assert tiles.heads_per_program(1, 4, 200, tile.rows, count) == {1: 4, 5: 2, 1000: 1}[count]


def test_queries_in_parts(monkeypatch):
    """Few keys and many queries: dK and dV are sums over parts of the queries."""
    monkeypatch.setattr(tiles, "processors", lambda device: 3)
    tile = tiles.tile("key", 32, 20, 4, 90)
    case = Case(h=1, n=9 * tile.rows + 5)
    assert tiles.parts(1, case.n, tile.rows, 3) == 2
    check(case, torch.float32)
    check(case, torch.float16)


def test_parts_have_the_strides_that_compilers_are_told(monkeypatch):
    monkeypatch.setattr(tiles, "processors", lambda device: 132)
    rows = tiles.tile("key", 32, 140, 4, 90).rows
    q, k, v = (torch.randn(1, 2, n, 32) for n in (9 * rows, 140, 140))
    sizes = (0.2, 0, 9 * rows, 0, 140)
    weights = torch.rand(1, 140, 3)
    saved = attention_map(q, k, v, weights, None, None, None, *sizes, True, True)
    torch.library.opcheck(
        attention_map_backward,
        (
            q,
            torch.randn_like(saved[1]),
            q,
            k,
            v,
            weights,
            None,
            None,
            None,
            *saved,
            *sizes,
            True,
            True,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_mask_that_favours_keys_reaches_no_row_past_the_last():
    """exp(mask) is no number in fp16, and 0 times it none either."""
    q, k, v = (torch.randn(1, 1, n, 32).half().requires_grad_() for n in (40, 140, 140))
    mask = torch.zeros(1, 140, dtype=torch.float16)
    mask[0, 3] = 12
    out, _ = attend(q, k, v, torch.rand(1, 140, 1), mask)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    grads, expected = (torch.autograd.grad(x.float().sum(), (q, k, v)) for x in (out, plain))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


def test_two_runs_are_equal_bit_for_bit():
    q, k, v = (torch.randn(1, 2, 40, 32) for _ in range(3))
    weights = torch.rand(1, 40, 3)
    q.requires_grad_()
    runs = []
    for _ in range(2):
        out, maps = attend(q, k, v, weights)
        (grad,) = torch.autograd.grad(out.sum() + maps.square().sum(), q)
        runs.append((out, maps, grad))
    assert all(map(torch.equal, *runs))


def test_autocast_computes_in_its_dtype():
    q, k, v = (torch.randn(1, 2, 8, 32) for _ in range(3))
    with torch.autocast("cpu", torch.float16):
        out, maps = attend(q, k, v.half(), torch.ones(1, 8, 1))
    assert out.dtype == torch.float16 and maps.dtype == torch.float32
    torch.testing.assert_close(maps, torch.ones(1, 1, 8), rtol=1e-5, atol=0)


@pytest.mark.parametrize("t", [20, 140])
@pytest.mark.parametrize("options", [{}, {"reduce": "none"}, {"rows": slice(3, 9)}], ids=str)
def test_compile_keeps_one_graph(t, options):
    q, k, v = (torch.randn(1, 2, n, 32, requires_grad=True) for n in (16, t, t))
    weights = torch.rand(1, t, 3)

    def loss(q, k, v):
        out, maps = attend(q * 2, k, v, weights, **options)
        return out.square().sum() + maps.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected)


@pytest.mark.parametrize("t", [20, 140])
def test_registration(t):
    """Schema, fake results and autograd of the operator, by torch's own check."""
    q, k, v = (torch.randn(1, 2, n, 32, requires_grad=True) for n in (16, t, t))
    sizes = (0.2, 0, 16, 0, t)
    call = functools.partial(torch.library.opcheck, attention_map)
    for mean in (True, False):
        call((q, k, v, torch.rand(1, t, 3), None, None, None, *sizes, mean, True))


@pytest.mark.parametrize("out, maps", [(1, 1), (1.1, 1), (1, 1.1), (1, float("nan"))])
def test_the_check_that_users_machines_run_sees_wrong_numbers(monkeypatch, out, maps):
    def scaled(*arguments, **options):
        given = attend(*arguments, **options)
        return given[0] * out, given[1] * maps

    monkeypatch.setattr(own_check, "attend", scaled)
    monkeypatch.setattr(own_check, "CASES", {torch.float16: [(40, 32, True)]})
    told = own_check.complaint("cpu")
    assert told == "" if out == maps == 1 else told.startswith("40 keys of size 32 in float16 are")
