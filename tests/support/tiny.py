"""Tiny random members of the denoiser families with inputs.

`MODELS[name]()` returns (model, keyword inputs, name of the image input). The whole pipelines are
`guidekit.testing.miniatures`.
"""

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils import logging

from guidekit.testing.miniatures import (
    SD_UNET,
    SDXL_UNET,
    autoencoder,
    sd_pipeline,
    sdxl_pipeline,
)
from guidekit.testing.text_encoders import WORDS, text_encoder, tokenizer
from guidekit.testing.weights import frozen_model as _frozen

__all__ = [
    "MODELS",
    "WORDS",
    "autoencoder",
    "sd_pipeline",
    "sdxl_pipeline",
    "text_encoder",
    "tokenizer",
]

# Lumina2 and PixArt warn about arguments of their own.
logging.set_verbosity_error()

BATCH, TEXT = 2, 7


def _random(*shape):
    return torch.randn(BATCH, *shape)


def sd15(height=16, width=16, **config):
    """Stable Diffusion 1.x topology with two levels; `config` overrides."""
    torch.manual_seed(0)
    config = SD_UNET | config
    inputs = dict(
        sample=_random(4, height, width),
        timestep=torch.tensor(10),
        encoder_hidden_states=_random(TEXT, config["cross_attention_dim"]),
    )
    return _frozen(UNet2DConditionModel(**config)), inputs, "sample"


def sdxl(height=16, width=16, **config):
    """SDXL topology with two levels; `config` overrides."""
    model, inputs, name = sd15(height, width, **SDXL_UNET | config)
    inputs["added_cond_kwargs"] = dict(text_embeds=_random(32), time_ids=_random(6))
    return model, inputs, name


def unet2d():
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return _frozen(model), dict(sample=_random(3, 16, 16), timestep=torch.tensor(10)), "sample"


def dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    inputs = dict(
        hidden_states=_random(4, 16, 16),
        timestep=torch.tensor([10, 10]),
        class_labels=torch.tensor([1, 2]),
    )
    return _frozen(model), inputs, "hidden_states"


def pixart():
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=24,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    mask = torch.ones(BATCH, TEXT)
    mask[:, 5:] = 0
    inputs = dict(
        hidden_states=_random(4, 16, 16),
        timestep=torch.tensor([10, 10]),
        encoder_hidden_states=_random(TEXT, 24),
        encoder_attention_mask=mask,
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
    )
    return _frozen(model), inputs, "hidden_states"


def sd3():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = dict(
        hidden_states=_random(4, 16, 16),
        timestep=torch.tensor([10.0, 10.0]),
        encoder_hidden_states=_random(TEXT, 32),
        pooled_projections=_random(64),
    )
    return _frozen(model), inputs, "hidden_states"


def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
    inputs = dict(
        hidden_states=_random(64, 4),
        timestep=torch.tensor([0.5, 0.5]),
        guidance=torch.tensor([3.5, 3.5]),
        encoder_hidden_states=_random(TEXT, 32),
        pooled_projections=_random(32),
        img_ids=grid,
        txt_ids=torch.zeros(TEXT, 3),
    )
    return _frozen(model), inputs, "hidden_states"


def sana():
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        patch_size=1,
    )
    inputs = dict(
        hidden_states=_random(4, 8, 8),
        timestep=torch.tensor([10, 10]),
        encoder_hidden_states=_random(TEXT, 24),
    )
    return _frozen(model), inputs, "hidden_states"


def qwen():
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = dict(
        hidden_states=_random(64, 16),
        timestep=torch.tensor([0.5, 0.5]),
        encoder_hidden_states=_random(TEXT, 32),
        encoder_hidden_states_mask=torch.ones(BATCH, TEXT, dtype=torch.long),
        img_shapes=[[(1, 8, 8)]] * BATCH,
    )
    return _frozen(model), inputs, "hidden_states"


def lumina2():
    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        scaling_factor=1.0,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(128, 128, 128),
        cap_feat_dim=32,
    )
    inputs = dict(
        hidden_states=_random(4, 16, 16),
        timestep=torch.tensor([0.5, 0.5]),
        encoder_hidden_states=_random(TEXT, 32),
        encoder_attention_mask=torch.ones(BATCH, TEXT, dtype=torch.bool),
    )
    return _frozen(model), inputs, "hidden_states"


MODELS = dict(
    sd15=sd15,
    sdxl=sdxl,
    unet2d=unet2d,
    dit=dit,
    pixart=pixart,
    sd3=sd3,
    flux=flux,
    sana=sana,
    qwen=qwen,
    lumina2=lumina2,
)
