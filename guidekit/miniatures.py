"""Tiny pipelines of every family with random weights, for tests of plugins.

They are real diffusers classes at 32x32 pixels (latents 16x16), made in a moment on a CPU without
any download, and the same at every call. The words of `WORDS` are one token each; others fall into
letters.
"""

import functools
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random weights everywhere, also where its residual branches begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            std = 0.05 if p.ndim < 2 else (p[0].numel()) ** -0.5
            noise = torch.randn(p.shape, generator=generator) * std
            p.copy_(1 + noise if p.ndim == 1 and bool((p == 1).all()) else noise)
    return model.eval()


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


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of `WORDS`; other words fall into letters."""
    words = [("\u2581" + word, -1.0) for word in WORDS]
    letters = [(chr(c), -9.0) for c in range(97, 123)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 encoder of one layer with 64 channels."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    return frozen_model(T5EncoderModel(config))


def autoencoder(**config) -> AutoencoderKL:
    """An AutoencoderKL of factor 2: 32x32 images for 16x16 latents; `config` adds to it."""
    return frozen_model(
        AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 16),
            layers_per_block=1, norm_num_groups=8, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, **config,
        )
    )  # fmt: skip


def _seeded(build: Callable[..., DiffusionPipeline]) -> Callable[..., DiffusionPipeline]:
    """The same weights at every call, no bars, and the caller's random numbers left alone."""

    @functools.wraps(build)
    def seeded(*args, **kwargs) -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = build(*args, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return seeded


@_seeded
def sd_pipeline() -> StableDiffusionPipeline:
    """A whole Stable Diffusion 1.x pipeline with DDIM.

    Cross-attention at 16x16, in a down and an up block, and at 8x8 in the middle and its
    neighbours: the layout of the built-in `scenes` model.
    """
    unet = UNet2DConditionModel(
        **SD_UNET
        | dict(
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
        )
    )
    words = tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=text_encoder(words), tokenizer=words,
        unet=frozen_model(unet),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@_seeded
def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline with Euler."""
    unet = UNet2DConditionModel(**SDXL_UNET | dict(cross_attention_dim=64))
    words = tokenizer()
    return StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=text_encoder(words), tokenizer=words,
        text_encoder_2=text_encoder(words, projection=True), tokenizer_2=words,
        unet=frozen_model(unet),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )  # fmt: skip


@_seeded
def ddpm_pipeline(learned: bool = False) -> DDPMPipeline:
    """An unconditional pixel model at 16x16 with DDPM; `learned`: with learned variance."""
    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=6 if learned else 3,
        block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    kind = "learned_range" if learned else "fixed_small"
    return DDPMPipeline(frozen_model(unet), DDPMScheduler(variance_type=kind))


def _flow_autoencoder() -> AutoencoderKL:
    return autoencoder(shift_factor=0.06, scaling_factor=1.5)


@_seeded
def dit_pipeline() -> DiTPipeline:
    """DiT: 1000 classes and a null, learned variance, DDIM."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        sample_size=16, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    names = {0: "tench, Tinca tinca", 1: "goldfish"}
    scheduler = DDIMScheduler(clip_sample=False)
    return DiTPipeline(frozen_model(model), autoencoder(), scheduler, id2label=names)


@_seeded
def pixart_pipeline() -> PixArtAlphaPipeline:
    """PixArt: T5 with a mask, learned variance, DPM++."""
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=16, patch_size=2, cross_attention_dim=32, caption_channels=64,
        norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip
    t5 = t5_tokenizer()
    return PixArtAlphaPipeline(
        transformer=frozen_model(model), scheduler=DPMSolverMultistepScheduler(),
        vae=autoencoder(), tokenizer=t5, text_encoder=t5_encoder(t5),
    )  # fmt: skip


@_seeded
def sd3_pipeline() -> StableDiffusion3Pipeline:
    """SD3: two CLIPs and T5, joint attention, flow matching."""
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    clip, t5 = tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=frozen_model(model), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_autoencoder(), tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5,
        text_encoder=text_encoder(clip, projection=True),
        text_encoder_2=text_encoder(clip, projection=True), text_encoder_3=t5_encoder(t5),
    )  # fmt: skip


@_seeded
def flux_pipeline() -> FluxPipeline:
    """Flux: T5 in joint attention, CLIP pooled, packed latents, the scale as an input."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    clip, t5 = tokenizer(), t5_tokenizer()
    return FluxPipeline(
        transformer=frozen_model(model), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_autoencoder(), tokenizer=clip, tokenizer_2=t5,
        text_encoder=text_encoder(clip), text_encoder_2=t5_encoder(t5),
    )  # fmt: skip
