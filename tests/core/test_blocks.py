"""Taps on blocks: outputs left bit equal, replaced or skipped, and features with their gradient."""

import pytest
import torch

import tiny
from guidekit.blocks import block_features
from guidekit.errors import GuidekitError
from guidekit.taps import tap_blocks
from tapped import run, traces

each_family = pytest.mark.parametrize("name", tiny.MODELS)


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
    with pytest.raises(GuidekitError, match=r"need grid=\(h, w\)"):
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
            pytest.raises(GuidekitError, match="cannot be skipped"),
            torch.no_grad(),
            tap_blocks(model, lambda call: call.skip(), site),
        ):
            run(model, inputs)
