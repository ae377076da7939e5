"""Tiny pipelines of every family with random weights, for tests of plugins.

They are real diffusers classes at 32x32 pixels (latents 16x16), made in a moment on a CPU without
any download, and the same at every call. The words of `WORDS` are one token each; others fall into
letters.
"""

import functools
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    ControlNetModel,
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
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
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
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a", "and", "red", "blue", "green", "circle", "square", "on", "white")
# Merges in this order leave no word a part of another's: the "re" of "red" splits "green".
LONGEST = sorted(WORDS, key=len, reverse=True)

# Topologies of Stable Diffusion 1.x and of SDXL with two levels.
SD_UNET = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=32,
    attention_head_dim=4,
    norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
SDXL_UNET = SD_UNET | dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=32 + 6 * 8,
    transformer_layers_per_block=(1, 2),
)


def frozen_model(model: nn.Module) -> nn.Module:
    """The model in eval mode, its weights without gradient."""
    return model.eval().requires_grad_(False)


def joins(parts: list[str]) -> list[tuple[str, str]]:
    """Merges of byte-pair encoding that make one token of the parts, from left to right."""
    return [("".join(parts[:i]), parts[i]) for i in range(1, len(parts))]


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
        pairs = joins([*word[:-1], word[-1] + "</w>"])  # r e d</w> -> re d</w> -> red</w>
        merges += pairs
        vocab += map("".join, pairs)
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=list(dict.fromkeys(merges)),
        model_max_length=77,
    )


def text_encoder(tokenizer: CLIPTokenizer, projection: bool = False) -> nn.Module:
    """A 32-channel CLIP text encoder of two layers over `tokenizer`'s vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
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


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer of `WORDS`, with the space before them; others fall into letters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["\u2581", "\n", *map(chr, range(33, 127)), *(f"<0x{i:02X}>" for i in range(256))]
    merges = [pair for word in LONGEST for pair in joins([*word])]
    merges += [("\u2581", word) for word in WORDS]
    vocab = dict.fromkeys([*special, *letters, *map("".join, merges)])
    return GemmaTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=list(dict.fromkeys(merges)),
        add_bos_token=True,
    )


def gemma_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """A Gemma 2 decoder of two layers with 32 channels."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return frozen_model(Gemma2Model(config))


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen 2 tokenizer over bytes, with merges for `WORDS` only."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [pair for word in LONGEST for pair in joins([*word])]
    merges += [("\u0120", word) for word in WORDS]  # a space before the word
    vocab = dict.fromkeys([*sorted(ByteLevel.alphabet()), *map("".join, merges), *special])
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=list(dict.fromkeys(merges)),
        extra_special_tokens=special[1:],
    )


def qwen_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen 2.5 VL of two layers with 32 channels and an eye of one layer."""
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        **ends,
    )
    eye = dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=eye, **ends)
    return frozen_model(Qwen2_5_VLForConditionalGeneration(config))


def autoencoder(**config) -> AutoencoderKL:
    """An AutoencoderKL of factor 2: 32x32 images for 16x16 latents; `config` adds to it."""
    return frozen_model(
        AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **config,
        )
    )


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
        vae=autoencoder(),
        text_encoder=text_encoder(words),
        tokenizer=words,
        unet=frozen_model(unet),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@_seeded
def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline with Euler."""
    unet = UNet2DConditionModel(**SDXL_UNET | dict(cross_attention_dim=64))
    words = tokenizer()
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(words),
        tokenizer=words,
        text_encoder_2=text_encoder(words, projection=True),
        tokenizer_2=words,
        unet=frozen_model(unet),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


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


@_seeded
def ddpm_pipeline(learned: bool = False) -> DDPMPipeline:
    """An unconditional pixel model at 16x16 with DDPM; `learned`: with learned variance."""
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=6 if learned else 3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    kind = "learned_range" if learned else "fixed_small"
    return DDPMPipeline(frozen_model(unet), DDPMScheduler(variance_type=kind))


def _flow_autoencoder() -> AutoencoderKL:
    return autoencoder(shift_factor=0.06, scaling_factor=1.5)


@_seeded
def dit_pipeline() -> DiTPipeline:
    """DiT: 1000 classes and a null, learned variance, DDIM."""
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    names = {0: "tench, Tinca tinca", 1: "goldfish"}
    scheduler = DDIMScheduler(clip_sample=False)
    return DiTPipeline(frozen_model(model), autoencoder(), scheduler, id2label=names)


@_seeded
def pixart_pipeline() -> PixArtAlphaPipeline:
    """PixArt: T5 with a mask, learned variance, DPM++."""
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=64,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    t5 = t5_tokenizer()
    return PixArtAlphaPipeline(
        transformer=frozen_model(model),
        scheduler=DPMSolverMultistepScheduler(),
        vae=autoencoder(),
        tokenizer=t5,
        text_encoder=t5_encoder(t5),
    )


@_seeded
def sd3_pipeline() -> StableDiffusion3Pipeline:
    """SD3: two CLIPs and T5, joint attention, flow matching."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )
    clip, t5 = tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=frozen_model(model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_autoencoder(),
        tokenizer=clip,
        tokenizer_2=clip,
        tokenizer_3=t5,
        text_encoder=text_encoder(clip, projection=True),
        text_encoder_2=text_encoder(clip, projection=True),
        text_encoder_3=t5_encoder(t5),
    )


@_seeded
def flux_pipeline() -> FluxPipeline:
    """Flux: T5 in joint attention, CLIP pooled, packed latents, the scale as an input."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    clip, t5 = tokenizer(), t5_tokenizer()
    pipe = FluxPipeline(
        transformer=frozen_model(model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_flow_autoencoder(),
        tokenizer=clip,
        tokenizer_2=t5,
        text_encoder=text_encoder(clip),
        text_encoder_2=t5_encoder(t5),
    )
    pipe.default_sample_size = 16  # the class's is 128
    return pipe


@_seeded
def sana_pipeline() -> SanaPipeline:
    """Sana: linear attention, cross-attention to Gemma 2, an AutoencoderDC of factor 4, DPM++."""
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=8,
        patch_size=1,
    )
    levels = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (16,) * 3)
    depths = dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), (1,) * 3)
    scales = dict.fromkeys(("encoder_qkv_multiscales", "decoder_qkv_multiscales"), ((),) * 3)
    vae = AutoencoderDC(latent_channels=4, scaling_factor=0.5, **levels, **depths, **scales)
    gemma = gemma_tokenizer()
    return SanaPipeline(
        transformer=frozen_model(model),
        vae=frozen_model(vae),
        tokenizer=gemma,
        text_encoder=gemma_encoder(gemma),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@_seeded
def lumina2_pipeline() -> Lumina2Pipeline:
    """Lumina2: pixels packed after Gemma 2's tokens, each image's own number; time runs up."""
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
        axes_lens=(300, 64, 64),
        cap_feat_dim=32,
    )
    gemma = gemma_tokenizer()
    pipe = Lumina2Pipeline(
        transformer=frozen_model(model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_flow_autoencoder(),
        tokenizer=gemma,
        text_encoder=gemma_encoder(gemma),
    )
    pipe.vae_scale_factor = 2  # the class's is 8, whatever the autoencoder's
    return pipe


@_seeded
def qwen_pipeline() -> QwenImagePipeline:
    """Qwen-Image: packed latents, joint attention with Qwen 2.5 VL, a video autoencoder."""
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
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.1, 0.5, 0.0],
        latents_std=[2.8, 1.4, 2.3, 1.0],
    )
    words = qwen_tokenizer()
    pipe = QwenImagePipeline(
        transformer=frozen_model(model),
        vae=frozen_model(vae),
        tokenizer=words,
        text_encoder=qwen_encoder(words),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    before = pipe.prompt_template_encode.partition("{}")[0]
    pipe.prompt_template_encode_start_idx = len(words(before)["input_ids"])
    pipe.default_sample_size = 16  # the class's is 128
    return pipe
