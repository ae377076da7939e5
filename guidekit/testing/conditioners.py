"""Tiny random controls for the tiny pipelines."""

from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)

from guidekit.backbones.map_encoder import MapEncoder
from guidekit.backbones.segment_map import SegmentMap, widened
from guidekit.testing.weights import frozen_model, randomised


def control_net(pipe: DiffusionPipeline, seed: int = 0, channels: int = 3) -> ControlNetModel:
    """A ControlNet for a small Stable Diffusion or SDXL pipeline, its zero convolutions random."""
    halvings = pipe.vae_scale_factor.bit_length() - 1
    net = ControlNetModel.from_unet(
        pipe.unet,
        conditioning_channels=channels,
        conditioning_embedding_out_channels=(*(16,) * halvings, 32),
    )
    return frozen_model(randomised(net, seed))


def t2i_adapter(pipe: DiffusionPipeline, seed: int = 0, channels: int = 3) -> T2IAdapter:
    """A T2I-Adapter for a small Stable Diffusion or SDXL pipeline."""
    xl = isinstance(pipe, StableDiffusionXLPipeline)
    adapter = T2IAdapter(
        in_channels=channels,
        channels=list(pipe.unet.config.block_out_channels),
        num_res_blocks=1,
        downscale_factor=pipe.vae_scale_factor * (2 if xl else 1),
        adapter_type="full_adapter_xl" if xl else "full_adapter",
    )
    return frozen_model(randomised(adapter, seed))


def map_encoder(pipe: DiffusionPipeline, classes: int, seed: int = 0) -> MapEncoder:
    """An encoder of maps of 32x32 into 17 tokens for a tiny Stable Diffusion pipeline."""
    width = pipe.unet.config.cross_attention_dim
    encoder = MapEncoder(
        conditioning_channels=classes, width=width, grid=4, channels=(8, 8, 8), layers=1, heads=2
    )
    return frozen_model(randomised(encoder, seed))


def segment_map(
    pipe: StableDiffusionPipeline, seed: int = 0, channels: int = 3
) -> tuple[StableDiffusionPipeline, SegmentMap]:
    """A tiny pipeline whose UNet reads further channels, and the control that makes them."""
    width = pipe.text_encoder.config.hidden_size
    prior = SegmentMap(text_channels=width, channels=channels)
    made = type(pipe)(**pipe.components | {"unet": widened(pipe.unet, channels)})
    randomised(made.unet.conv_in, seed)
    made.set_progress_bar_config(disable=True)
    return made, frozen_model(randomised(prior, seed))
