"""UViT: parameter counts, both conditionings, taps, checkpointing, compilation, saving."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from guidekit.backbones.records import layout_sites, site_grid
from guidekit.blocks import block_features
from guidekit.errors import GuidekitError
from guidekit.semantica.model import VARIANTS, UViT, variant
from guidekit.semantica.schedule import shift
from guidekit.taps import find_sites, tap_attention, tap_blocks
from guidekit.testing.weights import randomised

SMALL = dict(
    sample_size=16,
    block_out_channels=(8, 16, 32),
    layers_per_block=(1, 2, 2),
    patch_size=1,
    down_block_types=("conv", "transformer"),
    attention_head_dim=8,
    cross_attention_dim=12,
    embedding_dim=16,
    norm_num_groups=4,
)


def small(**changes) -> UViT:
    """A UViT of 16x16 images whose every branch does something."""
    return randomised(UViT(**SMALL | changes))


def inputs(batch=2, size=16, tokens=5):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, 3, size, size, generator=generator)
    return (
        z,
        torch.tensor([700.0, 20.0])[:batch],
        torch.randn(batch, tokens, 12, generator=generator),
    )


@pytest.mark.parametrize(
    "name, changes, count",
    [
        ("a", {}, 384_326_924),
        ("a", {"conditioning": "film"}, 318_468_620),
        ("b", {}, 386_589_443),
        ("c", {}, 1_323_799_811),
        ("tiny", {}, 2_165_900),
        ("tiny-pixel", {}, 2_238_723),
    ],
)
def test_parameters_and_stages(name, changes, count):
    with torch.device("meta"):
        model = variant(name, **changes)
    assert model.num_parameters() == count
    stages = [*model.down_blocks, model.mid_block]
    blocks = {"a": (3, 3, 3, 16), "b": (2, 3, 3, 3, 16), "c": (2, 3, 3, 3, 16)}
    if name in blocks:
        assert tuple(len(s.attentions or s.resnets) for s in stages) == blocks[name]
        assert [s.position.shape[-1] for s in stages if s.attentions] == [32, 16]
        sites = find_sites(model, "*.attn1")
        grids = {site: site_grid(model, site, 256, 256) for site in sites}
        assert [g for s, g in grids.items() if s.startswith("mid")] == 16 * [(16, 16)]
        assert [g for s, g in grids.items() if not s.startswith("mid")] == 6 * [(32, 32)]


def test_the_last_variant_doubles_channels():
    b, c = (VARIANTS[name]["block_out_channels"] for name in "bc")
    assert c == (b[0], *(2 * width for width in b[1:]))


@pytest.mark.parametrize("conditioning", ["tokens", "film"])
def test_it_reads_noise_level_and_condition_of_each_picture_alone(conditioning):
    model = small(conditioning=conditioning)
    z, t, states = inputs(tokens=5 if conditioning == "tokens" else 1)
    out = model(z, t, states).sample
    assert out.shape == z.shape
    one = model(z[1:], t[1], states[1:]).sample
    torch.testing.assert_close(out[1:], one, atol=1e-5, rtol=1e-4)
    for other in (model(z, t + 100, states), model(z, t, states.roll(1, 2))):
        assert (other.sample - out).abs().amax((1, 2, 3)).min() > 1e-4
    null = model(z, t, torch.zeros_like(states)).sample
    scaled = model(z, t, 3 * states + 1).sample  # tokens are normalised
    assert torch.isfinite(null).all()
    assert (null - out).abs().max() > 1e-4
    torch.testing.assert_close(scaled, out, atol=1e-4, rtol=1e-3)


def test_it_begins_at_zero_and_needs_its_condition():
    model = UViT(**SMALL)
    z, t, states = inputs()
    assert model(z, t, states).sample.abs().max() == 0
    with pytest.raises(GuidekitError, match="give encoder_hidden_states"):
        model(z, t)
    with pytest.raises(GuidekitError, match=r"global feature \(B, 1, D\)"):
        UViT(**SMALL | {"conditioning": "film"})(z, t, states)
    assert UViT(**SMALL | {"conditioning": "none"})(z, t).sample.shape == z.shape


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers_per_block": (1, 2)}, "one of each per stage"),
        ({"down_block_types": ("conv", "vit")}, "no block type vit"),
        ({"conditioning": "text"}, "tokens, film or none"),
        ({"sample_size": 15}, "take a multiple of 4"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(GuidekitError, match=message):
        UViT(**SMALL | changes)
    with pytest.raises(GuidekitError, match="no UViT 'd'; there are a, b, c, tiny"):
        variant("d")


def test_taps_see_its_attention_and_blocks():
    model = small()
    z, t, states = inputs()
    plain, seen = model(z, t, states).sample, {}
    cross = find_sites(model, "*.attn2")
    assert len(cross) == 2 + 2 + 2
    with tap_attention(
        model,
        lambda call: (
            seen.update({call.site: call.read(torch.ones(1, call.key.shape[2], 1))}) or None
        ),
        cross,
    ):
        assert torch.equal(model(z, t, states).sample, plain)
    for site, maps in seen.items():
        h, w = site_grid(model, site, 16, 16)
        assert maps.shape == (2, 1, h * w)
        torch.testing.assert_close(maps, torch.ones_like(maps))
    assert seen.keys() == layout_sites(model, 16, 16).keys()
    features = {}
    with tap_blocks(model, lambda call: features.update({call.site: call.run()}), "*resnets.0"):
        model(z, t, states)
    assert block_features(features["down_blocks.0.resnets.0"]).shape == (2, 8, 16, 16)


def test_checkpointing_changes_no_gradient():
    model = small().train()
    z, t, states = inputs()

    def gradients():
        model.zero_grad()
        model(z, t, states).sample.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_breaks(checkpointing):
    """Forward and backward, through convolutions and transformer blocks on both ways."""
    model = small(layers_per_block=(1, 1, 1)).train()
    z, t, states = inputs()
    if checkpointing:
        model.enable_gradient_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def gradients(net):
        model.zero_grad()
        out = net(z, t, states).sample
        out.square().sum().backward()
        return [out, *(p.grad.clone() for p in model.parameters())]

    for a, b in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_other_sizes_and_saving(tmp_path):
    model = small()
    z, t, states = inputs(size=32)
    assert model(z, t, states).sample.shape == z.shape
    model.save_pretrained(tmp_path)
    again = UViT.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("size", [16, 32, 256])
def test_what_it_is_told_of_the_noise(size):
    """The embedding's input runs from 0 to 1000 whatever the image's size."""
    model, told = small(sample_size=size), []
    model.time_embedding.register_forward_pre_hook(lambda _, args: told.append(args[0]))
    times = torch.tensor([1e-6, 0.5, 1.0])
    with torch.no_grad():
        model._embedding(torch.zeros(3, 3, size, size), times * 1000 - 1)
    channels = told[0].shape[1]
    expected = get_timestep_embedding(torch.tensor([0, 500, 1000.0]), channels)
    torch.testing.assert_close(told[0], expected, atol=0.2, rtol=0)


def test_the_shift_of_256_pixels():
    assert math.isclose(shift(256), -4.1589, abs_tol=1e-4)
