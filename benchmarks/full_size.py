"""Stable Diffusion 1.5 and SDXL at their full size with random weights, for costs alone."""

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import guidekit

SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def random_pipeline(xl: bool, dtype: torch.dtype, device: str = "cpu", **changes):
    """UNet of SD 1.5 or SDXL with random weights and the smallest texts that fit it.

    Full size but for `changes` of its configuration; made on a device, which a GPU does fast.
    """
    scenes = guidekit.load("scenes")
    tokenizer = scenes.tokenizer
    tokenizer.model_max_length = 77
    config = {"sample_size": 128 if xl else 64} | (SDXL if xl else SD15) | changes
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            unet = UNet2DConditionModel(**config)
        finally:
            torch.set_default_dtype(torch.float32)
    texts = [_text(tokenizer, 768, False)] + ([_text(tokenizer, 1280, True)] if xl else [])
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        "unet": unet,
        "scheduler": scenes.scheduler,
        "tokenizer": tokenizer,
        "text_encoder": texts[0],
    }
    if xl:
        pipeline = StableDiffusionXLPipeline(
            **parts, tokenizer_2=tokenizer, text_encoder_2=texts[1], add_watermarker=False
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, dtype)


def _text(tokenizer, width: int, projection: bool):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
