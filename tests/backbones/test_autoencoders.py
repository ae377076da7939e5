"""What stands in for the VAE, and the copy that gradients go through."""

import pytest
import torch
from diffusers import AutoencoderTiny

import tiny
from guidekit import Condition, Denoiser, Sampling, Segment, box_mask
from guidekit.backbones.base import wide
from guidekit_ilvr import Ilvr
from guidekit_multidiffusion import MultiDiffusion

LEFT = box_mask((0, 0, 0.5, 1))


@pytest.fixture
def small():
    """Stable Diffusion with an AutoencoderTiny of its factor in the place of the VAE."""
    pipe = tiny.sd_pipeline()
    torch.manual_seed(0)
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    return pipe


def test_a_tiny_autoencoder_has_latents(small):
    denoiser = Denoiser(small)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    found = denoiser.latents(pixels)
    assert torch.equal(found, small.vae.encode(pixels).latents)
    assert denoiser.pixels(found).shape == pixels.shape


def test_unguided_it_is_the_bare_pipeline(small):
    expected = small(
        "a red circle",
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(0)],
        output_type="pt",
    ).images
    assert torch.equal(
        Sampling(small, "a red circle", seeds=[0], steps=3).finish().images, expected
    )


def test_plugins_that_encode_act(small, tmp_path):
    condition = Condition("a red circle", segments=(Segment("red circle", LEFT),))
    for guidance in (MultiDiffusion(), Ilvr.example()):
        own = guidance.example_condition() if isinstance(guidance, Ilvr) else condition
        sampling = Sampling(small, own, [guidance], seeds=[0], steps=3).finish()
        assert torch.isfinite(sampling.images).all()
        assert sampling.account.acted(guidance.name)


def test_the_wide_copy_is_made_once_and_follows_the_weights():
    vae = tiny.sd_pipeline().vae.to(torch.bfloat16)
    first = wide(vae)
    assert first.dtype == torch.float32
    assert wide(vae) is first
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    second = wide(vae)
    assert second is not first
    torch.testing.assert_close(next(second.parameters()), next(vae.parameters()).float())
    assert wide(second) is second
