"""Tiny random ControlNets and T2I-Adapters for the tiny pipelines."""

from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionXLPipeline, T2IAdapter

from guidekit.testing.weights import frozen_model, randomised


def control_net(pipe: DiffusionPipeline, seed: int = 0, channels: int = 3) -> ControlNetModel:
    """A ControlNet for a tiny Stable Diffusion or SDXL pipeline, its zero convolutions random."""
    net = ControlNetModel.from_unet(
        pipe.unet, conditioning_channels=channels, conditioning_embedding_out_channels=(16, 32)
    )
    return frozen_model(randomised(net, seed))


def t2i_adapter(pipe: DiffusionPipeline, seed: int = 0, channels: int = 3) -> T2IAdapter:
    """A T2I-Adapter for a tiny Stable Diffusion or SDXL pipeline."""
    xl = isinstance(pipe, StableDiffusionXLPipeline)
    adapter = T2IAdapter(
        in_channels=channels,
        channels=list(pipe.unet.config.block_out_channels),
        num_res_blocks=1,
        downscale_factor=4 if xl else 2,
        adapter_type="full_adapter_xl" if xl else "full_adapter",
    )
    return frozen_model(randomised(adapter, seed))
