"""Trains a noise-aware CLIP: noisy images find their clean ones, without any text.

Liu et al., WACV 2023 (arXiv:2112.05744), section 3.2: symmetric InfoNCE between the encoder of
noisy images and the frozen one of clean images. The scale of the cosines is the CLIP's own,
which is the paper's 100 for OpenAI's; with 100 on a CLIP of scale 34 all embeddings fell together
within 200 steps. Departure: the noisy embedding is also pulled to its clean one. InfoNCE leaves it
free to turn away as long as images stay apart, and texts no longer fit what it then sees.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from guidekit.backbones.autoencoder import scaled
from guidekit.images import heat_map
from guidekit.noisy_clip.data import open_data
from guidekit.noisy_clip.files import load_clip
from guidekit.noisy_clip.loss import info_nce
from guidekit.noisy_clip.model import NoisyClip, look
from guidekit.zoo.shipped import ZOO


@dataclass(kw_only=True)
class NoisyClipOptions:
    """What is made noise-aware, and on which images."""

    base: str = "scenes-clip"  # a built-in, a folder, or ARCHITECTURE/TAG of open_clip
    data: str = "scenes"  # scenes, or a folder of images
    width: int = 256  # of the level's embedding
    pull: float = 1.0  # weight of scale * (1 - cosine) to the clean embedding; 0: the paper's loss
    autoencoder: str = ""  # folder of an AutoencoderKL, or scenes/vae: for latents


class Alignment(nn.Module):
    """InfoNCE and pull of noisy inputs to the frozen encoder's clean images.

    scale: factor on the cosines. pull: weight of scale * (1 - cosine) beside InfoNCE.
    """

    def __init__(self, encoder: NoisyClip, frozen: nn.Module, scale: float, pull: float):
        super().__init__()
        self.encoder, self.frozen, self.scale, self.pull = encoder, frozen, scale, pull

    def forward(
        self, pixels: Tensor, x0: Tensor, eps: Tensor, logsnr: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """Loss of x0 with noise eps `(B, C, h, w)` at logsnr `(B,)`; x0 is what pixels become.

        keys (B,): equal for equal images, which are no negatives of each other.
        """
        with torch.no_grad():
            clean = look(self.frozen, self.encoder.normalised(pixels)).embedding
        noisy = self.encoder(noised(x0, eps, logsnr), logsnr).embedding
        away = (1 - F.cosine_similarity(noisy.float(), clean.float())).mean()
        contrast = info_nce(noisy, clean, self.scale, keys)
        return {"info_nce": contrast, "pull": self.pull * self.scale * away}


class NoisyClipTask:
    """Trains the image encoder of a CLIP; all of it moves, the text encoder does not."""

    def __init__(self, options: NoisyClipOptions, folder: Path, size: int):
        own = folder / options.base
        clip = load_clip(own if own.exists() else options.base)
        self.size, self.data, self.vae = size, open_data(options.data), None
        latents = {}
        if options.autoencoder:
            built_in = ZOO / options.autoencoder
            path = built_in if built_in.exists() else options.autoencoder
            vae = AutoencoderKL.from_pretrained(path, use_safetensors=True)
            self.vae = vae.eval().requires_grad_(False)
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            latents = {"channels": self.vae.config.latent_channels, "factor": factor}
        self.encodes = self.vae is not None  # its batches
        encoder = NoisyClip(clip, options.width, size=size, **latents)
        for weight in encoder.trained():
            weight.requires_grad_(True)
        self.scale = float(clip.model.logit_scale.exp())
        self.net = Alignment(encoder, copy.deepcopy(clip.model.visual), self.scale, options.pull)
        self.whole = (clip, options, latents)

    def whole_net(self) -> nn.Module:
        """A second net of the same form."""
        clip, options, latents = self.whole
        encoder = NoisyClip(clip, options.width, size=self.size, **latents)
        return Alignment(encoder, copy.deepcopy(clip.model.visual), self.scale, options.pull)

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Images, what is noised, noise, and levels spread evenly over the batch."""
        pixels = self.data.pictures(numbers, self.size, generator)
        x0 = pixels if self.vae is None else self._latents(pixels)
        spread = torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        return {
            "pixels": pixels,
            "x0": x0,
            "eps": eps,
            "logsnr": logsnr_at(spread / len(x0)),
            "keys": self.data.keys(numbers),
        }

    def _latents(self, pixels: Tensor) -> Tensor:
        """Clean latents as the denoiser sees them, encoded where the encoder is trained."""
        vae = self.vae.to(next(self.net.parameters()).device)
        with torch.no_grad():
            return scaled(vae.encode(pixels.to(vae.device)).latent_dist.mode(), vae.config)

    def preview(self) -> Image.Image:
        """Cosines of 24 half-noised inputs (rows) and their clean images (columns)."""
        given = self.batch(range(24), torch.Generator().manual_seed(0))
        device = next(self.net.parameters()).device
        given = {k: v.to(device) for k, v in given.items()}
        logsnr = torch.zeros_like(given["logsnr"])
        noisy = self.net.encoder(noised(given["x0"], given["eps"], logsnr), logsnr).embedding
        clean = look(self.net.frozen, self.net.encoder.normalised(given["pixels"])).embedding
        return heat_map((F.normalize(noisy, dim=-1) @ F.normalize(clean, dim=-1).T).clamp(min=0))

    def export(self, folder: Path) -> None:
        """Saves the encoder, as `NoisyClip.from_pretrained` reads it."""
        self.net.encoder.save_pretrained(folder)


def noised(x0: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """a x0 + s eps with a^2 + s^2 = 1 at logsnr (B,)."""
    a, s = (torch.sigmoid(sign * logsnr).sqrt()[:, None, None, None] for sign in (1, -1))
    return a * x0 + s * eps


def logsnr_at(fraction: Tensor) -> Tensor:
    """Log signal-to-noise ratio of a fraction of a cosine schedule, 0 clean and 1 noise."""
    return -2 * torch.log(torch.tan((fraction * math.pi / 2).clamp(1e-3, math.pi / 2 - 1e-3)))


def make(options: NoisyClipOptions, folder: Path, size: int, quiet: bool = True) -> NoisyClipTask:
    """The task of a recipe's stage."""
    return NoisyClipTask(options, folder, size)


OPTIONS = NoisyClipOptions  # of a recipe's stage
LOOP = {"lr": 1e-4, "weight_decay": 1e-3, "batch": 256}  # the paper's
