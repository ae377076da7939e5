"""Taps on unmodified diffusers models: nothing changes, everything is seen, nothing stays."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

import tiny
from guidekit.attention.call import attend
from guidekit.errors import GuidekitError
from guidekit.taps import Patch, find_sites, tap_attention, tap_blocks
from tapped import ATTN2, one_hot, run, traces

# Sana's self-attention is linear: it has no softmax to see.
SITES = {name: "*.attn2" if name == "sana" else "*" for name in tiny.MODELS}
each_family = pytest.mark.parametrize("name", tiny.MODELS)


def map_gradient(model, inputs, x_name, sites="*", read=None, call_model=None):
    """Gradient to the input of the sum of squares of all maps, and how many were read."""
    read = read or (lambda call: call.read(one_hot(call)))
    maps = []

    def edit(call):
        result = read(call)
        maps.append(result[1] if isinstance(result, tuple) else result)
        return result[0] if isinstance(result, tuple) else None

    x = inputs[x_name].clone().requires_grad_()
    with tap_attention(model, edit, sites):
        run(model if call_model is None else call_model, inputs, **{x_name: x})
        count = len(maps)
        energy = sum(m.double().pow(2).sum() for m in maps[:count])
        return torch.autograd.grad(energy, x)[0], count


@each_family
def test_reading_leaves_the_output_bit_equal(name):
    model, inputs, _ = tiny.MODELS[name]()
    seen = []
    with torch.no_grad():
        before = run(model, inputs)
        with tap_attention(
            model, lambda call: seen.append(call.read(one_hot(call)).isfinite()), SITES[name]
        ) as names:
            during = run(model, inputs)
        after = run(model, inputs)
    assert len(seen) == len(names) == len(find_sites(model, SITES[name]))
    assert all(map(torch.all, seen))
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert not traces(model)


@each_family
def test_another_implementation_gives_the_same_output(name):
    model, inputs, _ = tiny.MODELS[name]()
    with torch.no_grad():
        before = run(model, inputs)
        for implementation in ("eager", "sdpa"):
            edit = lambda call: attend(call, one_hot(call))[0]  # noqa: E731
            with tap_attention(model, edit, SITES[name], implementation):
                during = run(model, inputs)
            torch.testing.assert_close(during, before, rtol=1e-5, atol=5e-6)


@each_family
def test_map_gradient_equals_eager(name):
    model, inputs, x_name = tiny.MODELS[name]()
    read, count = map_gradient(model, inputs, x_name, SITES[name])
    eager, _ = map_gradient(
        model, inputs, x_name, SITES[name], lambda call: attend(call, one_hot(call), "eager")
    )
    assert count == len(find_sites(model, SITES[name]))
    assert read.abs().max() > 0
    torch.testing.assert_close(read, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))


@pytest.mark.parametrize("name", ["sd15", "pixart"])  # others normalise in fp32 within
def test_map_gradient_equals_finite_differences(name):
    model, inputs, x_name = tiny.MODELS[name]()
    model.double()
    inputs = {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}
    gradient, _ = map_gradient(model, inputs, x_name)

    def energy(x):
        total = []
        read = lambda call: total.append(call.read(one_hot(call).double()).pow(2).sum())  # noqa: E731
        with torch.no_grad(), tap_attention(model, read):
            run(model, inputs, **{x_name: x})
        return sum(total)

    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(3)).double()
    step, x = 1e-5, inputs[x_name]
    numeric = (energy(x + step * direction) - energy(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "sd3", "flux"])
def test_gradient_checkpointing(name):
    model, inputs, x_name = tiny.MODELS[name]()
    plain, count = map_gradient(model, inputs, x_name)
    model.enable_gradient_checkpointing()
    again, same_count = map_gradient(model, inputs, x_name)
    assert count == same_count
    torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-7 * float(plain.abs().max()))


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_compile(name):
    model, inputs, x_name = tiny.MODELS[name]()
    plain, count = map_gradient(model, inputs, x_name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = run(compiled, inputs)
    gradient, same_count = map_gradient(model, inputs, x_name, call_model=compiled)
    with torch.no_grad():
        after = run(compiled, inputs)
    torch._dynamo.reset()
    assert count == same_count
    torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))
    assert torch.equal(before, after)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_patches_come_off_in_any_order(order):
    module = torch.nn.Identity()
    seen = []

    def around(name):
        return lambda original, args, kwargs: seen.append(name) or original(*args, **kwargs)

    patches = [Patch(module, around(name)) for name in range(3)]
    assert list(inspect.signature(module.forward).parameters) == ["input"]
    left = [2, 1, 0]
    for name in order:
        patches[name].remove()
        left.remove(name)
        seen.clear()
        module(torch.zeros(1))
        assert seen == left


def test_nested_taps_both_see_and_leave_nothing():
    model, inputs, _ = tiny.sd15()
    first, second = [], []
    taps = [
        tap_attention(model, lambda call, log=log: log.append(call.site), "*.attn2")
        for log in (first, second)
    ]
    with torch.no_grad():
        before = run(model, inputs)
        for tap in taps:
            tap.__enter__()
        assert torch.equal(before, run(model, inputs))
        taps[0].__exit__(None, None, None)
        run(model, inputs)
        taps[1].__exit__(None, None, None)
        assert torch.equal(before, run(model, inputs))
    assert (len(first), len(second)) == (4, 8)


def test_an_exception_leaves_no_trace():
    model, inputs, _ = tiny.sd15()
    with torch.no_grad():
        before = run(model, inputs)
        for tap, sites in ((tap_attention, "*"), (tap_blocks, "mid_block")):
            with pytest.raises(ZeroDivisionError), tap(model, lambda call: 1 / 0, sites):
                run(model, inputs)
            assert not traces(model)
        assert torch.equal(before, run(model, inputs))


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)])
def test_a_module_without_sdpa_call_says_why(processor):
    model, inputs, _ = tiny.sd15()
    model.get_submodule(ATTN2).set_processor(processor)
    with torch.no_grad():
        with tap_attention(model, lambda call: None, "down*"):
            run(model, inputs)
        with (
            pytest.raises(RuntimeError, match=f"{ATTN2}: .*disable_attention_slicing"),
            tap_attention(model, lambda call: None),
        ):
            run(model, inputs)
    assert not traces(model)


def test_linear_attention_says_why():
    model, inputs, _ = tiny.sana()
    with (
        pytest.raises(RuntimeError, match="attn1: SanaLinearAttn.* leave the module out"),
        torch.no_grad(),
        tap_attention(model, lambda call: None),
    ):
        run(model, inputs)


def test_sites_that_match_nothing_name_what_exists():
    model, _, _ = tiny.sd15()
    with pytest.raises(GuidekitError, match="'decoder.\\*' matches no attention site.*mid_block"):
        find_sites(model, ["mid_block.*", "decoder.*"])
    with pytest.raises(GuidekitError, match="no block site.*down_blocks.0.resnets.0"):
        find_sites(model, "up_blocks.7", "block")
    with pytest.raises(GuidekitError, match="kind is 'attention' or 'block'"):
        find_sites(model, "*", "layer")
    with pytest.raises(GuidekitError, match="has: none"):
        find_sites(torch.nn.Linear(1, 1), "*")


def test_sites_are_found_once_in_the_model_s_order():
    model, _, _ = tiny.sd15()
    found = find_sites(model, ["mid_block*", "down_blocks*", "*.attn2"])
    assert found == [n for n in find_sites(model, "*") if n in found]
    assert len(found) == len(set(found)) == 6


def test_an_edit_may_replace_the_output():
    model, inputs, _ = tiny.sd15()
    with torch.no_grad():
        before = run(model, inputs)
        with tap_attention(model, lambda call: torch.zeros_like(call.query), "*.attn1"):
            zero = run(model, inputs)
        with tap_attention(model, lambda call: call.identity(), "*.attn1"):
            perturbed = run(model, inputs)
    assert not torch.allclose(before, zero)
    assert not torch.allclose(before, perturbed)


def test_pipelines_run_bit_equal_under_taps():
    for pipe in (tiny.sd_pipeline(), tiny.sdxl_pipeline()):

        def images(pipe=pipe):
            return pipe(
                "a red circle and a blue square",
                num_inference_steps=2,
                output_type="pt",
                generator=torch.Generator().manual_seed(0),
            ).images

        before, count = images(), SimpleNamespace(n=0)

        def edit(call, count=count):
            call.read(one_hot(call))
            count.n += 1

        with tap_attention(pipe.unet, edit, "*.attn2") as names:
            assert torch.equal(before, images())
        assert count.n == 2 * len(names)
