"""Latents and images by the pipeline's autoencoder."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from guidekit.backbones.base import Denoiser, in_float32, wide
from guidekit.backbones.storage import wide_weights


class LatentDenoiser(Denoiser):
    """A denoiser of the latents of an AutoencoderKL, or of an AutoencoderTiny in its place."""

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along a side."""
        return self.pipeline.vae_scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of finished latents, exactly as the pipeline does it."""
        with torch.no_grad():
            if self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast"):
                with in_float32(self.vae):
                    pixels = self.vae.decode(self._unscale(z.float()), return_dict=False)[0]
            else:
                z = z.to(self.vae.dtype)
                pixels = self.vae.decode(self._unscale(z), return_dict=False)[0]
        return self._finish(pixels)

    def _finish(self, pixels: Tensor) -> Tensor:
        """Decoded pixels (B, 3, H, W) in [-1, 1] as images in [0, 1]."""
        return self.pipeline.image_processor.postprocess(pixels, output_type="pt")

    @property
    def _wide_vae(self) -> nn.Module:
        return wide(self.vae)

    def pixels(self, x0: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of clean latents x0, in float32 and with gradient."""
        vae = self._wide_vae
        with wide_weights(vae):
            return vae.decode(self._unscale(x0.to(vae.dtype)), return_dict=False)[0]

    def latents(self, pixels: Tensor) -> Tensor:
        """Clean latents x0 of images (B, 3, H, W) in [-1, 1], in float32 and with gradient."""
        vae = self._wide_vae
        with wide_weights(vae):
            found = vae.encode(pixels.to(vae.dtype))
        return scaled(_coded(found, None), vae.config)

    def drawn_latents(self, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Clean latents (B, C, h, w) to begin with, of images (B, 3, H, W) in [-1, 1].

        Drawn from what the encoder says of each, as diffusers' image-to-image pipelines do.
        """
        upcast = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast")
        with torch.no_grad(), in_float32(self.vae) if upcast else contextlib.nullcontext():
            coded = [self.vae.encode(row[None].to(self.vae.dtype)) for row in pixels]
        drawn = [_coded(one, g) for one, g in zip(coded, generators, strict=True)]
        return scaled(torch.cat(drawn), self.vae.config)

    def _unscale(self, z: Tensor) -> Tensor:
        shift = getattr(self.vae.config, "shift_factor", None)
        if shift is not None:  # SD3 and Flux
            return z / self.vae.config.scaling_factor + shift
        if getattr(self.vae.config, "latents_mean", None) is None:
            return z / self.vae.config.scaling_factor
        mean, std = statistics(z, self.vae.config)
        return z * std / self.vae.config.scaling_factor + mean


def _coded(found: Any, generator: torch.Generator | None) -> Tensor:
    """Latents that an encoder gave: drawn from their distribution, its mode without a generator.

    AutoencoderTiny gives latents, and no distribution of them.
    """
    if hasattr(found, "latents"):
        return found.latents
    dist = found.latent_dist
    return dist.mode() if generator is None else dist.sample(generator)


def scaled(x0: Tensor, config) -> Tensor:
    """An autoencoder's latents (B, C, h, w) as the denoiser sees them; `config` is its own."""
    mean, std = statistics(x0, config)
    return (x0 - mean) / std * config.scaling_factor


def statistics(z: Tensor, config) -> tuple[Tensor | float, Tensor | float]:
    """Mean and standard deviation of the latents' channels where the autoencoder has them."""
    if getattr(config, "latents_mean", None) is None:
        return getattr(config, "shift_factor", None) or 0.0, 1.0
    both = torch.tensor([config.latents_mean, config.latents_std], device=z.device)
    mean, std = both.to(z.dtype).view(2, 1, -1, 1, 1)
    return mean, std
