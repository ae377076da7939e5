"""Tiny Stable Diffusion and SDXL pipelines with random weights, for tests of plugins.

They are real diffusers classes at 32x32 pixels (latents 16x16), made in a moment on a CPU without
any download, and the same at every call. The words of `WORDS` are one token each; others fall into
letters.
"""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ("a", "and", "red", "blue", "green", "circle", "square", "on", "white")

# Topologies of Stable Diffusion 1.x and of SDXL with two levels.
SD_UNET = dict(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64),
    layers_per_block=1, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
SDXL_UNET = SD_UNET | dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
    transformer_layers_per_block=(1, 2),
)  # fmt: skip


def frozen_model(model: nn.Module) -> nn.Module:
    """The model in eval mode, its weights without gradient."""
    return model.eval().requires_grad_(False)


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over bytes, with merges for `WORDS` only: others fall into letters."""
    letters = sorted(ByteLevel.alphabet())
    vocab = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # left to right: r e d</w> -> re d</w> -> red</w>
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab.append(parts[0])
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=list(dict.fromkeys(merges)),
        model_max_length=77,
    )


def text_encoder(tokenizer: CLIPTokenizer, projection: bool = False) -> nn.Module:
    """A 32-channel CLIP text encoder of two layers over `tokenizer`'s vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return frozen_model((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def autoencoder() -> AutoencoderKL:
    """An AutoencoderKL of factor 2: 32x32 images for 16x16 latents."""
    return frozen_model(
        AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 16),
            layers_per_block=1, norm_num_groups=8, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )  # fmt: skip


def sd_pipeline() -> StableDiffusionPipeline:
    """A whole Stable Diffusion 1.x pipeline with DDIM.

    Cross-attention at 16x16, in a down and an up block, and at 8x8 in the middle and its
    neighbours: the layout of the built-in `scenes` model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            **SD_UNET
            | dict(
                down_block_types=("CrossAttnDownBlock2D",) * 2,
                up_block_types=("CrossAttnUpBlock2D",) * 2,
            )
        )
        words = tokenizer()
        pipe = StableDiffusionPipeline(
            vae=autoencoder(), text_encoder=text_encoder(words), tokenizer=words,
            unet=frozen_model(unet),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                clip_sample=False, set_alpha_to_one=False, steps_offset=1,
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline with Euler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**SDXL_UNET | dict(cross_attention_dim=64))
        words = tokenizer()
        pipe = StableDiffusionXLPipeline(
            vae=autoencoder(), text_encoder=text_encoder(words), tokenizer=words,
            text_encoder_2=text_encoder(words, projection=True), tokenizer_2=words,
            unet=frozen_model(unet),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            add_watermarker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddpm_pipeline(learned: bool = False) -> DDPMPipeline:
    """An unconditional pixel model at 16x16 with DDPM; `learned`: with learned variance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16, in_channels=3, out_channels=6 if learned else 3,
            block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
        )  # fmt: skip
        kind = "learned_range" if learned else "fixed_small"
        pipe = DDPMPipeline(frozen_model(unet), DDPMScheduler(variance_type=kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe
