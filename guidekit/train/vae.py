"""Autoencoder of the built-in latent model: diffusers' AutoencoderKL, four pixels to a latent."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from guidekit.images import sheet
from guidekit.worlds import scenes


@dataclass(kw_only=True)
class VAEOptions:
    """Architecture and loss of the autoencoder."""

    channels: tuple[int, ...] = (32, 64, 96)  # one halving of the side between neighbours
    latent_channels: int = 4
    kl: float = 1e-4  # weight of the divergence from N(0, 1), per latent number
    crop: int = 32  # side of the random crops in three of four batches; a quarter of the cost
    start: str = ""  # folder of an autoencoder to go on from, relative to the recipe's run
    decoder_only: bool = False  # leaves the latents as they are


class VAELoss(nn.Module):
    """Reconstruction and divergence of a batch of pictures."""

    def __init__(self, vae: AutoencoderKL, kl: float):
        super().__init__()
        self.vae, self.kl = vae, kl

    def forward(self, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of pixels `(B, 3, H, W)` in [-1, 1]; noise has the latents' shape."""
        posterior = self.vae.encode(pixels).latent_dist
        out = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return {
            "l1": F.l1_loss(out, pixels),
            "mse": F.mse_loss(out, pixels),
            "kl": self.kl * divergence,
        }


class VAETask:
    """Trains the autoencoder on scenes."""

    def __init__(self, options: VAEOptions, size: int, start: Path | None = None):
        self.size, self.shrink = size, 2 ** (len(options.channels) - 1)
        self.crop = options.crop
        self.decoder_only = options.decoder_only
        safe = dict(use_safetensors=True)
        vae = AutoencoderKL.from_pretrained(start, **safe) if start else _autoencoder(options, size)
        if self.decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        self.net = VAELoss(vae, options.kl)

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures of the numbered scenes, or crops of them, and the posterior's noise."""
        pixels, _ = scenes.batch([scenes.scene(i) for i in numbers], self.size)
        if (numbers.start // len(numbers)) % 4:
            pixels = _random_crop(pixels, self.crop, generator)
        side = pixels.shape[-1] // self.shrink
        shape = (len(pixels), self.net.vae.config.latent_channels, side, side)
        return {"pixels": pixels, "noise": torch.randn(shape, generator=generator)}

    def preview(self) -> Image.Image:
        """Held-out scenes above their reconstructions."""
        vae = self.net.vae
        pixels, _ = scenes.batch([scenes.scene(i, "test") for i in range(8)], self.size)
        pixels = pixels.to(vae.device)
        back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        return sheet(torch.cat([pixels, back]), 8)

    def export(self, folder: Path) -> None:
        """Saves the autoencoder with the scale that gives its latents unit variance."""
        vae = self.net.vae
        if not self.decoder_only:
            latents = encode([scenes.scene(i) for i in range(512)], vae, self.size)
            vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
        vae.save_pretrained(folder)


def _autoencoder(options: VAEOptions, size: int) -> AutoencoderKL:
    """An untrained autoencoder; without attention, so that crops train it for whole pictures."""
    stages = len(options.channels)
    return AutoencoderKL(
        block_out_channels=options.channels,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=1,
        latent_channels=options.latent_channels,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


def _random_crop(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """The same random window of all pictures."""
    free = pixels.shape[-1] - side + 1
    y, x = torch.randint(free, (2,), generator=generator).tolist()
    return pixels[..., y : y + side, x : x + side].contiguous()


def encode(plans: list[scenes.Scene], vae: AutoencoderKL, size: int, batch: int = 64) -> Tensor:
    """Posterior means of the scenes' pictures, unscaled: `(n, C, h, w)` on the CPU."""
    parts = []
    with torch.no_grad():
        for i in range(0, len(plans), batch):
            pixels, _ = scenes.batch(plans[i : i + batch], size)
            parts.append(vae.encode(pixels.to(vae.device)).latent_dist.mode().cpu())
    return torch.cat(parts)
