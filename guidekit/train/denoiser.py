"""Denoiser of the built-in latent model: a UNet with cross-attention to captions, v-prediction.

Velocity as in Salimans and Ho 2022 (arXiv:2202.00512), null prompt for classifier-free guidance as
in Ho and Salimans 2022 (arXiv:2207.12598).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from guidekit.images import sheet
from guidekit.train.text import tokenize, varied_caption
from guidekit.train.vae import encode
from guidekit.worlds import scenes


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


class DenoiserLoss(nn.Module):
    """Error of the predicted velocity, the text encoder being trained along."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, z: Tensor, timestep: Tensor, ids: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Mean squared error over z `(B, C, h, w)` at timestep `(B,)` for token ids `(B, T)`."""
        states = self.text_encoder(ids).last_hidden_state
        return {"mse": F.mse_loss(self.unet(z, timestep, states).sample.float(), v)}


class DenoiserTask:
    """Trains UNet and text encoder on the latents of scenes."""

    def __init__(self, options: DenoiserOptions, vae: AutoencoderKL, text: Path, size: int):
        self.options, self.vae, self.size = options, vae.eval().requires_grad_(False), size
        self.tokenizer = CLIPTokenizer.from_pretrained(text / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(
            text / "text_encoder", dtype=torch.float32, use_safetensors=True
        )
        self.net = DenoiserLoss(_unet(options, vae, encoder, size), encoder)
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        self.latents = self._pool()

    def _pool(self) -> Tensor:
        """Latents of the training scenes `(pool, C, h, w)`, scaled."""
        plans = [scenes.scene(i) for i in range(self.options.pool)]
        with torch.autocast(self.vae.device.type, torch.bfloat16):
            latents = encode(plans, self.vae, self.size)
        return latents.float() * self.vae.config.scaling_factor

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy latents, timesteps spread evenly over the batch, captions, velocities."""
        picked = [i % self.options.pool for i in numbers]
        rng = np.random.default_rng(numbers.start)
        texts = [
            "" if rng.random() < self.options.null else varied_caption(scenes.scene(i), rng)
            for i in picked
        ]
        x0 = self.latents[picked].float()
        eps = torch.randn(x0.shape, generator=generator)
        spread = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
        timestep = (spread * self.scheduler.config.num_train_timesteps).long()
        return {
            "z": self.scheduler.add_noise(x0, eps, timestep),
            "timestep": timestep,
            "ids": tokenize(self.tokenizer, texts),
            "v": self.scheduler.get_velocity(x0, eps, timestep),
        }

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
        """Pictures drawn for eight held-out captions."""
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        captions = [scenes.scene(i, "test").caption for i in range(8)]
        drawn = pipeline(
            captions,
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(i) for i in range(8)],
            output_type="pt",
        ).images
        truth, _ = scenes.batch([scenes.scene(i, "test") for i in range(8)], self.size)
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
