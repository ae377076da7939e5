"""Whole tiny random pipelines of the transformer families, 32x32 pictures, on the CPU."""

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import tiny


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of `tiny.WORDS`; other words fall into letters."""
    words = [("\u2581" + word, -1.0) for word in tiny.WORDS]
    letters = [(chr(c), -9.0) for c in range(97, 123)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 encoder of one layer with 64 channels."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    return _frozen(T5EncoderModel(config))


def _frozen(model):
    return model.eval().requires_grad_(False)


def _autoencoder() -> AutoencoderKL:
    config = tiny.autoencoder().config
    return _frozen(AutoencoderKL.from_config(config, shift_factor=0.06, scaling_factor=1.5))


def sd3_pipeline() -> StableDiffusion3Pipeline:
    """SD3: two CLIPs and T5, joint attention, flow matching."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    clip, t5 = tiny.tokenizer(), t5_tokenizer()
    return _quiet(StableDiffusion3Pipeline(
        transformer=_frozen(model), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(), tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5,
        text_encoder=tiny.text_encoder(clip, projection=True),
        text_encoder_2=tiny.text_encoder(clip, projection=True), text_encoder_3=t5_encoder(t5),
    ))  # fmt: skip


def flux_pipeline() -> FluxPipeline:
    """Flux: T5 in joint attention, CLIP pooled, packed latents, the scale as an input."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    clip, t5 = tiny.tokenizer(), t5_tokenizer()
    return _quiet(FluxPipeline(
        transformer=_frozen(model), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(), tokenizer=clip, tokenizer_2=t5,
        text_encoder=tiny.text_encoder(clip), text_encoder_2=t5_encoder(t5),
    ))  # fmt: skip


def pixart_pipeline() -> PixArtAlphaPipeline:
    """PixArt: T5 with a mask, learned variance, DPM++."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=16, patch_size=2, cross_attention_dim=32, caption_channels=64,
        norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip
    t5 = t5_tokenizer()
    return _quiet(PixArtAlphaPipeline(
        transformer=_frozen(model), scheduler=DPMSolverMultistepScheduler(), vae=_autoencoder(),
        tokenizer=t5, text_encoder=t5_encoder(t5),
    ))  # fmt: skip


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
