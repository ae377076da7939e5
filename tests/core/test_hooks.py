"""Taps beside what others put on a model: its hooks, processors, adapters and backends stay."""

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
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

import tiny
from guidekit.taps import find_sites, tap_attention
from tapped import ATTN2, one_hot, run, traces


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


def test_processors_are_the_same_objects():
    model, inputs, _ = tiny.sd15()
    before = {name: id(p) for name, p in model.attn_processors.items()}
    with torch.no_grad(), tap_attention(model, lambda call: None):
        run(model, inputs)
        assert before == {name: id(p) for name, p in model.attn_processors.items()}
    assert all(isinstance(p, AttnProcessor2_0) for p in model.attn_processors.values())
