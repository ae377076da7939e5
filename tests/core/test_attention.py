"""Maps of one attention call against materialised softmax, and the choice of implementation."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from attention_calls import make_call, masks, segments, softmax_of
from guidekit.attention import call as attention
from guidekit.attention import choice as chosen
from guidekit.attention import maps as attention_maps
from guidekit.attention.call import AttentionCall, attend
from guidekit.attention.choice import choose, implementations
from guidekit.attention.maps import token_maps
from guidekit.errors import GuidekitError
from guidekit.taps import tap_attention


@pytest.mark.parametrize("kind", ["none", "boolean", "additive", "row"])
@pytest.mark.parametrize("reduce", ["mean", "none"])
@pytest.mark.parametrize("hk", [4, 2])
def test_maps_equal_softmax(kind, reduce, hk, monkeypatch):
    monkeypatch.setattr(attention_maps, "CHUNK", 50)  # several chunks of heads and rows
    call = make_call(hk=hk)
    mask = masks(2, 4, 12, 7)[kind]
    rows = slice(2, 9)
    maps = token_maps(call.query, call.key, segments(7), mask, 0.3, rows, reduce)
    p = softmax_of(call, mask, 0.3)[:, :, rows] @ segments(7)[:, None]
    wanted = (p.mean(1) if reduce == "mean" else p).transpose(-1, -2)
    assert maps.shape == ((2, 3, 7) if reduce == "mean" else (2, 4, 3, 7))
    torch.testing.assert_close(maps, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize("reduce", ["mean", "none"])
@pytest.mark.parametrize("hk", [2, 1])
def test_gradcheck(kind, reduce, hk, monkeypatch):
    monkeypatch.setattr(attention_maps, "CHUNK", 30)
    call = make_call(1, 2, hk, 5, 6, 3, torch.float64, grad=True)
    mask = masks(1, 2, 5, 6)[kind]
    weights = segments(6, torch.float64)

    def maps(query, key):
        return token_maps(query, key, weights, mask, rows=slice(1, 5), reduce=reduce)

    assert torch.autograd.gradcheck(maps, (call.query, call.key))


def test_chunk_size_does_not_matter(monkeypatch):
    call = make_call(grad=True)
    weights = segments(7)

    def maps_and_gradients():
        maps = token_maps(call.query, call.key, weights)
        return maps, *torch.autograd.grad(maps.pow(2).sum(), (call.query, call.key))

    whole = maps_and_gradients()
    monkeypatch.setattr(attention_maps, "CHUNK", 1)
    for one, many in zip(whole, maps_and_gradients(), strict=True):
        torch.testing.assert_close(one, many)


def test_weights_per_image():
    call = make_call()
    weights = torch.stack([segments(7)[0], segments(7)[0].flip(0)])
    maps = token_maps(call.query, call.key, weights)
    for i in range(2):
        alone = token_maps(call.query[i : i + 1], call.key[i : i + 1], weights[i : i + 1])
        torch.testing.assert_close(maps[i : i + 1], alone)


def test_a_row_without_allowed_keys_has_zero_maps():
    call = make_call(grad=True)
    call.mask = torch.ones(2, 1, 12, 7, dtype=torch.bool)
    call.mask[0, :, 3] = False
    maps = call.read(segments(7))
    assert torch.equal(maps[0, :, 3], torch.zeros(3))
    assert torch.autograd.grad(maps.sum(), call.query)[0].isfinite().all()
    for name in ("eager", "sdpa"):
        out, same = attend(call, segments(7), name)
        assert out[0, :, 3].abs().max() == 0
        torch.testing.assert_close(same, maps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_are_fp32_under_autocast_and_in_half_precision(dtype):
    call = make_call(dtype=dtype)
    exact = token_maps(call.query.float(), call.key.float(), segments(7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = call.read(segments(7))
        _, attended = attend(call, segments(7), "sdpa")
        fp32 = make_call()
        _, mixed = attend(fp32, segments(7), "sdpa")
        _, wanted = attend(fp32, segments(7), "eager")
    assert maps.dtype == attended.dtype == mixed.dtype == torch.float32
    torch.testing.assert_close(maps, exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(attended, exact, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(mixed, wanted, rtol=2e-2, atol=1e-3)


def map_error(found, true):
    return ((found.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("std", [1, 2, 4])
def test_maps_in_half_precision_lose_few_digits(std):
    """Weights beside V round P and each head's map; averages are divided after the heads' sum.

    Against maps in fp32 of the same halves: less than what Q and K lost when they were rounded,
    which in bf16 at logits of deviation 1, 2, 4 is 6e-4, 1.7e-3, 3.3e-3.
    """
    generator = torch.Generator().manual_seed(std)
    draw = lambda n: torch.randn(1, 8, n, 64, generator=generator, dtype=torch.float64)  # noqa: E731
    query, key, value = draw(512) * std**0.5, draw(77) * std**0.5, draw(77)
    weights = torch.zeros(1, 77, 4, dtype=torch.float64)
    weights[0, 3:6, 0] = 1 / 3
    weights[0, 9, 1] = weights[0, 20:26, 2] = weights[0, 40, 3] = 1
    true = token_maps(query, key, weights)
    for dtype, most in ((torch.float16, 2e-4), (torch.bfloat16, 1.3e-3)):
        halves = [x.to(dtype) for x in (query, key, value)]
        rounded = token_maps(*(x.double() for x in halves[:2]), weights)
        maps = attend(AttentionCall("", None, 0, *halves), weights.float(), "sdpa")[1]
        added, lost = map_error(maps, rounded), map_error(rounded, true)
        assert added < most, (dtype, added, lost)
        assert added < lost, (dtype, added, lost)


def test_averages_are_exact_in_half_precision():
    """1/3 is not a bf16 number: a map of three equal keys is theirs, not 0.3 percent less."""
    call = make_call(1, 64, 64, 16, 3, dtype=torch.bfloat16)
    call.key = torch.zeros_like(call.key)
    weights = torch.full((1, 3, 1), 1 / 3)
    _, maps = attend(call, weights, "sdpa")
    torch.testing.assert_close(maps, torch.full((1, 1, 16), 1 / 3), rtol=1e-6, atol=0)


def saved_bytes(compute):
    """Bytes of distinct storage that autograd keeps for `compute`."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    return sum(kept.values()), result


def test_p_is_not_kept():
    b, h, n, t, d = 1, 4, 256, 200, 8
    call = make_call(b, h, h, n, t, d, grad=True)
    weights = segments(t)
    p_bytes = 4 * b * h * n * t
    inputs = 4 * (b * h * (n + t) * d + t * 3 + b * h * n)
    maps_bytes, _ = saved_bytes(lambda: call.read(weights))
    sdpa_bytes, _ = saved_bytes(lambda: attend(call, weights, "sdpa"))
    eager_bytes, _ = saved_bytes(lambda: attend(call, weights, "eager"))
    assert maps_bytes <= inputs
    assert sdpa_bytes < p_bytes / 3
    assert eager_bytes >= p_bytes


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any one operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            # views such as an expanded gradient have no storage of their own
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numbers = max(self.numbers, size)
        return out


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    call = make_call(1, 4, 4, 256, 200, 8, grad=True)
    weights = segments(200)
    largest = {}
    for chunk in (10_000, 10**6):
        monkeypatch.setattr(attention_maps, "CHUNK", chunk)
        with Largest() as mode:
            torch.autograd.grad(call.read(weights).pow(2).sum(), (call.query, call.key))
        largest[chunk] = mode.numbers
    assert largest[10_000] <= 10_000 < 4 * 256 * 200 == largest[10**6]


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize("hk", [4, 2])
@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_sdpa_equals_eager(kind, hk, reduce):
    call = make_call(hk=hk, grad=True)
    call.mask, call.scale = masks(2, 4, 12, 7)[kind], 0.3
    call.extend(torch.randn(2, hk, 3, 8), torch.randn(2, hk, 3, 8), 0.5)
    generator = torch.Generator().manual_seed(2)
    results = {}
    for name in ("eager", "sdpa"):
        out, maps = attend(call, segments(7), name, slice(1, 11), reduce)
        directions = [torch.randn(x.shape, generator=generator.manual_seed(2)) for x in (out, maps)]
        inputs = (call.query, call.key, call.value)
        results[name] = (out, maps, *torch.autograd.grad((out, maps), inputs, directions))
        torch.testing.assert_close(out, call.run(), rtol=0, atol=2e-6)
    for eager, sdpa in zip(*results.values(), strict=True):
        torch.testing.assert_close(sdpa, eager, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart"])
def test_maps_equal_diffusers_attention_scores(name):
    """Against `get_attention_scores`, which materialises P."""
    model, inputs, _ = tiny.MODELS[name]()
    read, wanted = {}, {}

    def edit(call):
        weights = torch.eye(call.key.shape[2])[None]
        read[call.site] = call.read(weights)

        def merged(x):
            return x.flatten(0, 1)

        mask = call.mask
        if mask is not None:
            mask = merged(mask.expand(*call.query.shape[:2], *mask.shape[2:]))
        p = call.module.get_attention_scores(merged(call.query), merged(call.key), mask)
        p = p.unflatten(0, call.query.shape[:2])
        wanted[call.site] = p.mean(1).transpose(-1, -2)

    with torch.no_grad(), tap_attention(model, edit, "*.attn2"):
        model(**inputs)
    assert read
    for site in read:
        torch.testing.assert_close(read[site], wanted[site], rtol=0, atol=1e-6)
    if name == "pixart":  # the last two text tokens are masked
        assert all(maps[:, 5:].max() < 1e-6 for maps in read.values())


def test_refusals():
    call = make_call()
    with pytest.raises(GuidekitError, match="reduce is 'mean' or 'none', not 'sum'"):
        call.read(segments(7), reduce="sum")
    with pytest.raises(GuidekitError, match=r"weights must be \(B or 1, T=7, S\), not \(1, 5, 3\)"):
        call.read(segments(5))
    with pytest.raises(GuidekitError, match="detach them"):
        call.read(segments(7).requires_grad_())
    call.is_causal = True
    with pytest.raises(GuidekitError, match="causal"):
        call.read(segments(7))


def test_choice_of_implementation(monkeypatch):
    states = implementations()
    assert list(states) == ["eager", "sdpa", "triton", "xformers"]
    monkeypatch.delenv("GUIDEKIT_ATTENTION", raising=False)
    assert choose() == choose("auto") == "sdpa"  # nothing is measured on a CPU
    monkeypatch.setenv("GUIDEKIT_ATTENTION", "eager")
    assert choose() == "eager"
    assert choose("sdpa") == "sdpa"
    for name, state in states.items():
        monkeypatch.setenv("GUIDEKIT_ATTENTION", name)
        if state == "available":
            assert choose() == name
        else:
            with pytest.raises(RuntimeError, match=f"attention '{name}' cannot run"):
                choose()
    with pytest.raises(GuidekitError, match="no attention implementation 'flash'"):
        choose("flash")
    with pytest.raises(GuidekitError, match="no attention implementation 'eger'"):
        monkeypatch.setenv("GUIDEKIT_ATTENTION", "eger")
        choose()


def test_an_implementation_that_is_missing_says_why(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen._triton_state.cache_clear()
    chosen._xformers_state.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="is not installed; available: eager, sdpa$"):
            choose("triton")
        with pytest.raises(RuntimeError, match=r"guidekit\[xformers\]"):
            attend(make_call(), segments(7), "xformers")
    finally:
        chosen._triton_state.cache_clear()
        chosen._xformers_state.cache_clear()


def test_the_chosen_implementation_runs(monkeypatch):
    """A call that an edit leaves alone goes to the named implementation."""
    model, inputs, _ = tiny.sd15()
    calls = []
    monkeypatch.setitem(attention._RUN, "eager", lambda call: calls.append(call) or _sdpa(call))
    with torch.no_grad(), tap_attention(model, lambda call: None, "*", "eager"):
        model(**inputs)
    assert len(calls) == 8


def _sdpa(call):
    return F.scaled_dot_product_attention(call.query, call.key, call.value)
