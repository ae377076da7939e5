"""Edits of one attention call, against materialised softmax: bias, paint, identity, more keys."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

from attention_calls import make_call, masks, segments, softmax_of
from guidekit.attention.call import attend
from guidekit.errors import GuidekitError
from guidekit.taps import tap_attention


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bias_is_added_to_the_logits(kind, implementation):
    call = make_call()
    call.implementation = implementation
    mask = masks(2, 4, 12, 7)[kind]
    call.mask = mask
    bias = torch.randn(2, 1, 12, 7)
    call.bias(bias)
    call.bias(bias[:1, :, :1])
    if kind == "boolean":
        mask = torch.where(mask, 0.0, float("-inf"))
    p = softmax_of(call, bias + bias[:1, :, :1] + (0 if mask is None else mask))
    torch.testing.assert_close(call.run(), p @ call.value, rtol=0, atol=2e-6)
    wanted = (p.mean(1) @ segments(7)).transpose(-1, -2)
    torch.testing.assert_close(call.read(segments(7)), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_paint_is_the_bias_of_its_factors(kind, implementation):
    call, biased = make_call(), make_call()
    call.mask = biased.mask = masks(2, 4, 12, 7)[kind]
    for s in (3, 2):
        segments, words = torch.rand(2, s, 12), torch.randn(2, 7, s)
        call.paint(segments, words)
        biased.bias((segments.mT @ words.mT)[:, None])
    torch.testing.assert_close(call.run(), biased.run(), rtol=0, atol=2e-6)
    weights = torch.rand(2, 7, 2)
    for found, wanted in zip(
        attend(call, weights, implementation), attend(biased, weights, "eager"), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(call.read(weights), biased.read(weights), rtol=0, atol=1e-6)


@pytest.mark.parametrize("hk", [4, 2])
def test_identity_outputs_the_values(hk):
    call = make_call(hk=hk, t=12)
    call.identity()
    assert torch.equal(call.run(), call.value.repeat_interleave(4 // hk, dim=1))
    out, _ = attend(call, segments(12), "eager")
    assert torch.equal(out, call.run())
    with pytest.raises(GuidekitError, match="needs self-attention, not 12 queries, 7 keys"):
        make_call().identity()


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_identity_of_some_rows_leaves_the_others(kind):
    call, pixels = make_call(t=12), slice(2, 9)
    shut = torch.zeros(1, 1, 12, 12)
    shut[..., 0] = float("-inf")  # a padded text token
    if kind != "none":
        call.mask = shut == 0 if kind == "boolean" else shut
    inside = torch.zeros(12, 12)
    inside[pixels, pixels] = torch.where(torch.eye(7) == 1, 0.0, float("-inf"))
    p = softmax_of(call, inside + (0 if kind == "none" else shut))
    call.identity(pixels)
    torch.testing.assert_close(call.run(), p @ call.value, rtol=0, atol=2e-6)


def test_extend_equals_diffusers_ip_adapter():
    torch.manual_seed(0)
    module = Attention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8).eval()
    adapter = IPAdapterAttnProcessor2_0(32, 24, num_tokens=(4,), scale=0.7)
    x, text, image = torch.randn(2, 16, 32), torch.randn(2, 7, 24), torch.randn(2, 1, 4, 24)
    stock = module.processor

    def edit(call):
        heads = (
            linear(image[:, 0]).view(2, 4, 4, 8).transpose(1, 2)
            for linear in (adapter.to_k_ip[0], adapter.to_v_ip[0])
        )
        call.extend(*heads, 0.7)

    with torch.no_grad(), tap_attention(torch.nn.ModuleDict({"attn2": module}), edit):
        ours = module(x, text)
    module.set_processor(adapter)
    with torch.no_grad():
        theirs = module(x, (text, [image]))
        module.set_processor(stock)
        plain = module(x, text)
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, plain)
