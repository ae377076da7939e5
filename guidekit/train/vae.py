"""Autoencoder of the built-in latent model: diffusers' AutoencoderKL, four pixels to a latent."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from guidekit.images import sheet
from guidekit.train.worlds import SHAPES, World


@dataclass(kw_only=True)
class VAEOptions:
    """Architecture and loss of the autoencoder."""

    channels: tuple[int, ...] = (32, 64, 96)  # one halving of the side between neighbours
    latent_channels: int = 4
    kl: float = 1e-4  # weight of the divergence from N(0, 1), per latent number
    crop: int = 32  # side of the random crops in three of four batches; a quarter of the cost
    start: str = ""  # folder of an autoencoder to go on from, relative to the recipe's run
    decoder_only: bool = False  # leaves the latents as they are
    source: str = "scenes"  # scenes | cutouts
    cutouts: str = ""  # folder of the cut-outs; `guidekit train --cutouts` sets it
    whole: int = 4  # one of so many batches is of whole images
    on_things: bool = False  # every crop is laid on a thing of its scene
    squares: float = 1.0  # weight of the squared error, which is for what stands out, as eyes do
    edges: float = 0.0  # weight of the error of differences between neighbours, which blur has
    logvar: float = 0.0  # of the posterior at first; far below 0 the noise hides no colours then
    shrunk: float = 0.0  # weight of the error of latents at half size: latents that scale as images


class VAELoss(nn.Module):
    """Reconstruction and divergence of a batch of images."""

    def __init__(self, vae: AutoencoderKL, options: VAEOptions):
        super().__init__()
        self.vae, self.options = vae, options

    def forward(self, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of pixels `(B, 3, H, W)` in [-1, 1]; noise has the latents' shape."""
        posterior = self.vae.encode(pixels).latent_dist
        z = posterior.mean + posterior.std * noise
        out = self.vae.decode(z).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        losses = {
            "l1": F.l1_loss(out, pixels),
            "mse": self.options.squares * F.mse_loss(out, pixels),
            "kl": self.options.kl * divergence,
        }
        return losses | self._more_losses(z, out, pixels)

    def _more_losses(self, z: Tensor, out: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """Edges, and latents at half size, where the options weigh them.

        A diffusion model learns latents sooner that keep their sense when they are scaled
        (EQ-VAE, arXiv:2502.09509).
        """
        losses, options = {}, self.options
        if options.edges:
            losses["edges"] = options.edges * _edge_error(out, pixels)
        if options.shrunk:
            small = self.vae.decode(F.avg_pool2d(z, 2)).sample.float()
            losses["shrunk"] = options.shrunk * F.l1_loss(small, F.avg_pool2d(pixels, 2))
        return losses


def _edge_error(out: Tensor, pixels: Tensor) -> Tensor:
    """Mean error of the differences between neighbours, of pixels `(B, 3, H, W)`."""
    error = out - pixels
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


class VAETask:
    """Trains the autoencoder on scenes."""

    def __init__(
        self, options: VAEOptions, size: int, start: Path | None = None, world: World = SHAPES
    ):
        self.options, self.world = options, world
        self.size, self.shrink = size, 2 ** (len(options.channels) - 1)
        self.decoder_only = options.decoder_only
        safe = dict(use_safetensors=True)
        vae = AutoencoderKL.from_pretrained(start, **safe) if start else _autoencoder(options, size)
        if self.decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        self.net = VAELoss(vae, options)

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Images of the numbered scenes, or crops of them, and the posterior's noise."""
        plans = [self.world.scene(i) for i in numbers]
        pixels = self.world.images(plans, self.size)
        if (numbers.start // len(numbers)) % self.options.whole:
            crop = _crop_on_things if self.options.on_things else _random_crop
            pixels = crop(pixels, self.options.crop, generator, plans)
        side = pixels.shape[-1] // self.shrink
        shape = (len(pixels), self.net.vae.config.latent_channels, side, side)
        return {"pixels": pixels, "noise": torch.randn(shape, generator=generator)}

    def preview(self) -> Image.Image:
        """Held-out scenes above their reconstructions."""
        vae = self.net.vae
        pixels = self.world.images([self.world.scene(i, "test") for i in range(8)], self.size)
        pixels = pixels.to(vae.device)
        back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        return sheet(torch.cat([pixels, back]), 8)

    def export(self, folder: Path) -> None:
        """Saves the autoencoder with the scale that gives its latents unit variance."""
        vae = self.net.vae
        if not self.decoder_only:
            plans = [self.world.scene(i) for i in range(512)]
            latents = encode(plans, vae, self.size, self.world)
            vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
        vae.save_pretrained(folder)


def _autoencoder(options: VAEOptions, size: int) -> AutoencoderKL:
    """An untrained autoencoder; without attention, so that crops train it for whole images."""
    stages = len(options.channels)
    vae = AutoencoderKL(
        block_out_channels=options.channels,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=1,
        latent_channels=options.latent_channels,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.bias[options.latent_channels :] += options.logvar
    return vae


def _random_crop(pixels: Tensor, side: int, generator: torch.Generator, plans: list) -> Tensor:
    """The same random window of all images."""
    free = pixels.shape[-1] - side + 1
    y, x = torch.randint(free, (2,), generator=generator).tolist()
    return pixels[..., y : y + side, x : x + side].contiguous()


def _crop_on_things(pixels: Tensor, side: int, generator: torch.Generator, plans: list) -> Tensor:
    """A window of each image near a thing of its plan."""
    size, out = pixels.shape[-1], []
    for image, plan in zip(pixels, plans, strict=True):
        pick, dy, dx = torch.rand(3, generator=generator).tolist()
        thing = plan.things[int(pick * len(plan.things))]
        y = round(thing.y * size + (dy - 0.5) * side / 2 - side / 2)
        x = round(thing.x * size + (dx - 0.5) * side / 2 - side / 2)
        y, x = min(max(y, 0), size - side), min(max(x, 0), size - side)
        out.append(image[:, y : y + side, x : x + side])
    return torch.stack(out)


def encode(
    plans: list, vae: AutoencoderKL, size: int, world: World = SHAPES, batch: int = 64
) -> Tensor:
    """Posterior means of the scenes' images, unscaled: `(n, C, h, w)` on the CPU."""
    parts = []
    with torch.no_grad():
        for i in range(0, len(plans), batch):
            pixels = world.images(plans[i : i + batch], size)
            parts.append(vae.encode(pixels.to(vae.device)).latent_dist.mode().cpu())
    return torch.cat(parts)
