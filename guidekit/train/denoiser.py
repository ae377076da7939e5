"""Denoiser of the built-in latent model: a UNet with cross-attention to captions, v-prediction.

Velocity as in Salimans and Ho 2022 (arXiv:2202.00512), null prompt for classifier-free guidance as
in Ho and Salimans 2022 (arXiv:2207.12598).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from guidekit.images import sheet
from guidekit.train.latents import Latents
from guidekit.train.text import tokenize
from guidekit.train.worlds import SHAPES, World


@dataclass(kw_only=True)
class DenoiserOptions:
    """Architecture and data of the denoiser."""

    channels: tuple[int, ...] = (64, 128)  # one halving of the latents' side between neighbours
    heads: tuple[int, ...] = (2, 4)
    layers: int = 1  # residual and attention blocks per resolution
    null: float = 0.1  # share of captions replaced by the empty prompt
    vae: str = "vae/model"  # folder of the autoencoder, relative to the recipe's run
    text: str = "text/model"  # folder of tokenizer and text encoder, likewise
    pool: int = 24_000  # scenes whose latents are encoded once and held in memory
    source: str = "scenes"  # scenes | cutouts
    cutouts: str = ""  # folder of the cut-outs; `guidekit train --cutouts` sets it
    train_text: bool = True  # trains the text encoder along
    beta_end: float = 0.012  # of the noise schedule; more of it leaves less of the image at its end
    spacing: str = "leading"  # of the sampler's steps: leading | trailing
    gamma: float = math.inf  # the largest weight of the error of x0 is 1 + gamma (min-SNR)


class DenoiserLoss(nn.Module):
    """Error of the predicted velocity; the text encoder is trained along unless it is frozen."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, weights: Tensor):
        """weights: `(timesteps,)`, of the error at each noise level."""
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, z: Tensor, timestep: Tensor, ids: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Mean squared error over z `(B, C, h, w)` at timestep `(B,)` for token ids `(B, T)`."""
        states = self.text_encoder(ids).last_hidden_state
        error = (self.unet(z, timestep, states).sample.float() - v) ** 2
        return {"mse": (error.mean((1, 2, 3)) * self.weights[timestep]).mean()}


class DenoiserTask:
    """Trains UNet and text encoder on the latents of scenes."""

    def __init__(
        self,
        options: DenoiserOptions,
        vae: AutoencoderKL,
        text: Path,
        size: int,
        world: World = SHAPES,
        cache: Path | None = None,
    ):
        """cache: a folder that keeps the latents for a training that is started again."""
        self.options, self.vae, self.size = options, vae.eval().requires_grad_(False), size
        self.world = world
        self.tokenizer = CLIPTokenizer.from_pretrained(text / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(
            text / "text_encoder", dtype=torch.float32, use_safetensors=True
        )
        encoder.requires_grad_(options.train_text)
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=options.beta_end,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing=options.spacing,
        )
        snr = self.scheduler.alphas_cumprod / (1 - self.scheduler.alphas_cumprod)
        weights = (snr + 1).clamp(max=1 + options.gamma) / (snr + 1)  # snr + 1 turns v into x0
        self.net = DenoiserLoss(_unet(options, vae, encoder, size), encoder, weights)
        self.latents = Latents(world, vae, options.pool, size, cache)
        self.encodes = cache is not None  # else all are encoded before the first step
        if not self.encodes:
            self.latents.fill()

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy latents, timesteps spread evenly over the batch, captions, velocities."""
        picked = [i % self.options.pool for i in numbers]
        rng = np.random.default_rng(numbers.start)
        texts = [self._text(i, rng) for i in picked]
        x0 = self.latents.of(picked)
        eps = torch.randn(x0.shape, generator=generator)
        spread = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
        timestep = (spread * self.scheduler.config.num_train_timesteps).long()
        return {
            "z": self.scheduler.add_noise(x0, eps, timestep),
            "timestep": timestep,
            "ids": tokenize(self.tokenizer, texts),
            "v": self.scheduler.get_velocity(x0, eps, timestep),
        }

    def _text(self, number: int, rng: np.random.Generator) -> str:
        """A wording of training scene `number`, or none, for classifier-free guidance."""
        if rng.random() < self.options.null:
            return ""
        return self.world.varied_caption(self.world.scene(number), rng)

    def pipeline(self) -> StableDiffusionPipeline:
        """The trained parts as the pipeline that users load."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.net.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.net.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def preview(self) -> Image.Image:
        """Images drawn for eight held-out captions."""
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        plans = [self.world.scene(i, "test") for i in range(8)]
        captions = [plan.caption for plan in plans]
        drawn = pipeline(
            captions,
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(i) for i in range(8)],
            output_type="pt",
        ).images
        truth = self.world.images(plans, self.size)
        return sheet(torch.cat([truth, drawn.cpu().float() * 2 - 1]), 8)

    def export(self, folder: Path) -> None:
        """Saves the whole pipeline in half precision."""
        self.pipeline().to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)


def _unet(
    options: DenoiserOptions, vae: AutoencoderKL, encoder: CLIPTextModel, size: int
) -> UNet2DConditionModel:
    """A UNet whose every resolution attends to the text."""
    stages = len(options.channels)
    return UNet2DConditionModel(
        sample_size=size // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=options.channels,
        down_block_types=("CrossAttnDownBlock2D",) * stages,
        up_block_types=("CrossAttnUpBlock2D",) * stages,
        layers_per_block=options.layers,
        attention_head_dim=options.heads,  # diffusers' name for the number of heads
        cross_attention_dim=encoder.config.hidden_size,
        norm_num_groups=16,
    )
