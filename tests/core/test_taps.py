"""Taps on unmodified diffusers models: nothing changes, everything is seen, nothing stays."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)

import tiny
from guidekit.attention.call import attend
from guidekit.blocks import block_features
from guidekit.taps import Patch, find_sites, tap_attention, tap_blocks

ATTN2 = "mid_block.attentions.0.transformer_blocks.0.attn2"
# Sana's self-attention is linear: it has no softmax to see.
SITES = {name: "*.attn2" if name == "sana" else "*" for name in tiny.MODELS}
each_family = pytest.mark.parametrize("name", tiny.MODELS)


def run(model, inputs, **changed):
    out = model(**inputs | changed)
    return out[0] if isinstance(out, tuple) else out.sample


def traces(model):
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def one_hot(call, columns=3):
    return torch.eye(call.key.shape[2])[None, :, :columns]


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
def test_blocks_leave_the_output_bit_equal(name):
    model, inputs, _ = tiny.MODELS[name]()
    features = {}

    def edit(call):
        out = call.run()
        if not call.site.startswith("context_refiner"):  # Lumina2's text alone
            grid, rows = (8, 8), slice(-64, None)
            features[call.site] = block_features(out, grid, rows)

    with torch.no_grad():
        before = run(model, inputs)
        with tap_blocks(model, edit, "*"):
            during = run(model, inputs)
    assert torch.equal(before, during)
    assert not traces(model)
    assert all(f.ndim == 4 and f.shape[0] == tiny.BATCH for f in features.values())


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


class Count(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_diffusers_hooks_are_kept():
    model, inputs, _ = tiny.sd15()
    module = model.get_submodule(ATTN2)
    early, late, seen = Count(), Count(), []
    HookRegistry.check_if_exists_or_initialize(module).register_hook(early, "early")
    with torch.no_grad():
        with tap_attention(model, lambda call: seen.append(call.site), ATTN2):
            run(model, inputs)
            HookRegistry.check_if_exists_or_initialize(module).register_hook(late, "late")
            run(model, inputs)
        run(model, inputs)
    assert (early.calls, late.calls, len(seen)) == (3, 2, 2)


class CountAccelerate(AccelerateHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_accelerate_hooks_are_kept():
    model, inputs, _ = tiny.sd15()
    hook, seen = CountAccelerate(), []
    add_hook_to_module(model.get_submodule(ATTN2), hook)
    with torch.no_grad():
        with tap_attention(model, lambda call: seen.append(call.site), ATTN2):
            run(model, inputs)
        run(model, inputs)
    assert (hook.calls, len(seen)) == (2, 1)
    assert traces(model) == [ATTN2]


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
    with pytest.raises(ValueError, match="'decoder.\\*' matches no attention site.*mid_block"):
        find_sites(model, ["mid_block.*", "decoder.*"])
    with pytest.raises(ValueError, match="no block site.*down_blocks.0.resnets.0"):
        find_sites(model, "up_blocks.7", "block")
    with pytest.raises(ValueError, match="kind is 'attention' or 'block'"):
        find_sites(model, "*", "layer")
    with pytest.raises(ValueError, match="has: none"):
        find_sites(torch.nn.Linear(1, 1), "*")


def test_sites_are_found_once_in_the_model_s_order():
    model, _, _ = tiny.sd15()
    found = find_sites(model, ["mid_block*", "down_blocks*", "*.attn2"])
    assert found == [n for n in find_sites(model, "*") if n in found]
    assert len(found) == len(set(found)) == 6


def test_ip_adapter_calls_are_told_apart_by_index():
    model, inputs, _ = tiny.sd15()
    for site in find_sites(model, "*.attn2"):
        width = model.get_submodule(site).to_q.in_features
        model.get_submodule(site).set_processor(IPAdapterAttnProcessor2_0(width, 32, (4,), 0.5))
    model.encoder_hid_proj = lambda embeds: [embeds[0]]
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    seen = []
    with (
        torch.no_grad(),
        tap_attention(model, lambda call: seen.append((call.index, call.key.shape[2])), "*.attn2"),
    ):
        run(model, inputs, added_cond_kwargs={"image_embeds": [torch.randn(2, 1, 4, 32)]})
    assert seen == [(0, 7), (1, 4)] * 4


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_fused_projections_are_seen(name):
    model, inputs, _ = tiny.MODELS[name]()
    read = {}

    def keep(call):
        read.setdefault(call.site, []).append(call.read(one_hot(call)))

    with torch.no_grad():
        for fuse in (False, True):
            if fuse:
                model.fuse_qkv_projections()
            with tap_attention(model, keep):
                run(model, inputs)
    assert len(read) == len(find_sites(model, "*"))
    for plain, fused in read.values():
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-6)


class LowRank(torch.nn.Module):
    """What PEFT puts in the place of a Linear."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.delta = torch.nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base(x) + self.delta(x)


def test_low_rank_adapters_are_in_the_key():
    model, inputs, _ = tiny.sd15()
    module = model.get_submodule(ATTN2)
    module.to_k = LowRank(module.to_k)
    keys = []
    with torch.no_grad(), tap_attention(model, lambda call: keys.append(call.key), ATTN2):
        run(model, inputs)
        wanted = module.to_k(inputs["encoder_hidden_states"])
    assert torch.equal(keys[0].transpose(1, 2).flatten(2), wanted)


def test_an_invisible_backend_is_native_during_tapped_calls_only(monkeypatch):
    """flex stands for flash, sage and xformers: none of them ends in SDPA."""
    model, inputs, _ = tiny.flux()
    used = []

    def flex(query, key, value, **kwargs):
        used.append("flex")
        return torch.zeros_like(query)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.FLEX, flex)
    tapped = "transformer_blocks.0.attn"
    processor = model.get_submodule(tapped).processor
    seen = []
    with torch.no_grad():
        with (
            attention_backend("flex"),
            tap_attention(model, lambda call: seen.append(call.site), tapped),
        ):
            run(model, inputs)
            assert processor._attention_backend is None
        processor._attention_backend = "flex"
        with tap_attention(model, lambda call: seen.append(call.site), tapped):
            run(model, inputs)
    assert seen == [tapped] * 2
    assert used == ["flex"] * 3
    assert processor._attention_backend == "flex"
    assert _AttentionBackendRegistry._active_backend == AttentionBackendName.NATIVE


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


def test_processors_are_the_same_objects():
    model, inputs, _ = tiny.sd15()
    before = {name: id(p) for name, p in model.attn_processors.items()}
    with torch.no_grad(), tap_attention(model, lambda call: None):
        run(model, inputs)
        assert before == {name: id(p) for name, p in model.attn_processors.items()}
    assert all(isinstance(p, AttnProcessor2_0) for p in model.attn_processors.values())


FEATURES = {
    ("sd15", "down_blocks.0"): (32, 8, 8),
    ("sd15", "mid_block"): (64, 8, 8),
    ("sd15", "up_blocks.1"): (32, 16, 16),
    ("sd15", "down_blocks.0.attentions.0"): (32, 16, 16),
    ("sd15", "up_blocks.0.resnets.1"): (64, 8, 8),
    ("unet2d", "mid_block.attentions.0"): (64, 8, 8),
    ("dit", "transformer_blocks.1"): (32, 8, 8),
    ("pixart", "transformer_blocks.1"): (32, 8, 8),
    ("sana", "transformer_blocks.1"): (32, 8, 8),
    ("sd3", "transformer_blocks.1"): (32, 8, 8),
    ("sd3", "transformer_blocks.2"): (32, 8, 8),
    ("flux", "transformer_blocks.1"): (32, 8, 8),
    ("flux", "single_transformer_blocks.1"): (32, 8, 8),
    ("qwen", "transformer_blocks.0"): (32, 8, 8),
    ("lumina2", "layers.1"): (32, 8, 8),
}


@pytest.mark.parametrize(("name", "site"), FEATURES)
def test_features_and_their_gradient(name, site):
    model, inputs, x_name = tiny.MODELS[name]()
    rows = slice(tiny.TEXT, None) if name == "lumina2" else slice(None)
    taken = {}

    def edit(call):
        taken[call.site] = block_features(call.run(), (8, 8), rows)

    x = inputs[x_name].clone().requires_grad_()
    with tap_blocks(model, edit, site):
        run(model, inputs, **{x_name: x})
    assert taken[site].shape == (tiny.BATCH, *FEATURES[name, site])
    assert torch.autograd.grad(taken[site].pow(2).sum(), x)[0].abs().max() > 0


def test_tokens_become_features_row_by_row():
    tokens = torch.arange(12.0).view(1, 6, 2)  # channels 0 and 1 of 2x3 pixels
    features = block_features((None, tokens), (2, 3))
    assert features[0, 0].tolist() == [[0, 2, 4], [6, 8, 10]]
    with pytest.raises(ValueError, match=r"need grid=\(h, w\)"):
        block_features(tokens)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_block_outputs_can_be_replaced(name):
    model, inputs, _ = tiny.MODELS[name]()
    site = {"sd15": "mid_block", "flux": "transformer_blocks.0"}[name]

    def doubled(call):
        out = call.run()
        return out * 2 if torch.is_tensor(out) else (out[0], out[1] * 2)

    with torch.no_grad():
        before = run(model, inputs)
        with tap_blocks(model, doubled, site):
            assert not torch.allclose(before, run(model, inputs))


SKIPPED = [
    "sd15 mid_block.attentions.0",
    "sd15 mid_block.resnets.1",
    "sd3 transformer_blocks.1",
    "sd15 mid_block.attentions.0.transformer_blocks.0",
    "dit transformer_blocks.0",
    "flux transformer_blocks.0",
    "flux single_transformer_blocks.0",
    "qwen transformer_blocks.1",
]


@pytest.mark.parametrize("where", SKIPPED)
def test_a_skipped_block_hands_on_its_input(where):
    """Skipping equals returning the input by hand, in the format that the block returns."""
    name, site = where.split()
    model, inputs, _ = tiny.MODELS[name]()

    def by_hand(call):
        given = call.kwargs.get("hidden_states", call.args[0] if call.args else None)
        if site.endswith("resnets.1"):
            return call.args[0]
        real = call.run()
        if torch.is_tensor(real):
            return given
        return (given,) if len(real) == 1 else (call.kwargs["encoder_hidden_states"], given)

    results = []
    with torch.no_grad():
        for edit in (by_hand, lambda call: call.skip()):
            with tap_blocks(model, edit, site):
                results.append(run(model, inputs))
        assert torch.equal(*results)
        assert not torch.allclose(results[0], run(model, inputs))


def test_a_block_that_cannot_be_skipped_says_so():
    model, inputs, _ = tiny.sd15()
    for site in ("down_blocks.0", "down_blocks.1.resnets.0"):
        with (
            pytest.raises(ValueError, match="cannot be skipped"),
            torch.no_grad(),
            tap_blocks(model, lambda call: call.skip(), site),
        ):
            run(model, inputs)


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
