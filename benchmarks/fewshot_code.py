"""The row "latent code": a diffusion autoencoder whose code a linear classifier reads.

DiffAE's role (Preechakul et al., CVPR 2022, arXiv:2111.15640) at the size of the built-in worlds:
an encoder and a denoiser that is told its code are trained together on unlabelled images, a
denoiser of codes draws new ones, and those are kept that a classifier of the few labels accepts.
D2C (arXiv:2106.06819) is left out: it needs an NVAE with a contrastive encoder.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from guidekit.backbones.remade import remade
from guidekit.heads.linear import Linear, fit_linear
from guidekit.images import sheet
from guidekit.train import Loop, Options
from guidekit.train.pixels import PixelsOptions, PixelsTask, pixel_unet, velocity_batch
from guidekit.worlds import digits

CODE = 64  # numbers of a code
STEPS = 50  # of the samplers of codes and of images
FILE = "code.safetensors"
LEAST = 0.2  # probability at which a code is accepted, as an image is by the plugin fewshot
#: Architecture of each world's model: that of its denoiser among the built-in models.
WORLDS = {
    "digits": (8, 1, PixelsOptions(data="digits", channels=(48, 96), dropout=0.1, jitter=0.5)),
    "scenes": (32, 3, PixelsOptions(data="scenes")),
}


class CodeNet(nn.Module):
    """Encoder and denoiser; the code is added to the embedding of the timestep."""

    def __init__(self, unet: UNet2DModel, colours: int, size: int, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(colours, width, 3, padding=1)]
        for _ in range(round(math.log2(size)) - 2):  # to 4x4
            layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 2 * width, 3, 2, 1)]
            width *= 2
        layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Flatten(), nn.Linear(16 * width, CODE)]
        self.encoder = nn.Sequential(*layers)
        self.unet = remade(unet, class_embed_type="identity")
        self.into = nn.Linear(CODE, 4 * unet.config.block_out_channels[0])

    def denoise(self, z: Tensor, timestep: Tensor, code: Tensor) -> Tensor:
        """Velocities of noisy images z (B, C, H, W), told codes (B, CODE)."""
        return self.unet(z, timestep, class_labels=self.into(code)).sample

    def forward(self, z: Tensor, timestep: Tensor, v: Tensor, x0: Tensor) -> dict[str, Tensor]:
        """The error of the velocity where the code is that of the clean image."""
        return {"mse": F.mse_loss(self.denoise(z, timestep, self.encoder(x0)).float(), v)}


class CodeTask(PixelsTask):
    """Trains encoder and denoiser on unlabelled images."""

    def __init__(self, world: str):
        size, colours, options = WORLDS[world]
        super().__init__(options, size)
        self.net = CodeNet(pixel_unet(options, size, colours, colours), colours, size)

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """As for a denoiser, with the clean images."""
        x0 = self.pictures(numbers, generator)
        return velocity_batch(x0, self.scheduler, generator) | {"x0": x0}

    def preview(self) -> Image.Image:
        """Images above what their codes alone bring back."""
        x0 = self.pictures(range(8), torch.Generator().manual_seed(0))
        self.net.eval()
        found = _drawn(self.scheduler, x0.shape, self.net.denoise, self.net.encoder(x0))
        self.net.train()
        return sheet(torch.cat([x0, found]), 8)

    def export(self, folder: Path) -> None:
        """Writes the weights."""
        _write(self.net, folder)


class Prior(nn.Module):
    """A denoiser of normalised codes: three layers, told the timestep."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(CODE + 64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width, CODE)

    def denoise(self, z: Tensor, timestep: Tensor) -> Tensor:
        """Velocities of noisy codes (B, CODE)."""
        told = get_timestep_embedding(timestep.expand(len(z)), 64)
        return self.last(self.layers(torch.cat([z, told.to(z)], 1)))

    def forward(self, z: Tensor, timestep: Tensor, v: Tensor) -> dict[str, Tensor]:
        """The error of the velocity."""
        return {"mse": F.mse_loss(self.denoise(z, timestep).float(), v)}


class PriorTask:
    """Trains the denoiser of codes on those of unlabelled images."""

    def __init__(self, codes: Tensor, task: CodeTask):
        self.codes, self.scheduler, self.net = codes, task.scheduler, Prior()

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy codes."""
        rows = torch.randint(len(self.codes), (len(numbers),), generator=generator)
        return velocity_batch(self.codes[rows], self.scheduler, generator)

    def preview(self) -> Image.Image:
        """Nothing that a person would read."""
        return Image.new("RGB", (8, 8))

    def export(self, folder: Path) -> None:
        """Writes the weights."""
        _write(self.net, folder)


def _write(net: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / FILE)


@torch.no_grad()
def _drawn(scheduler, shape, denoise, *told: Tensor, seed: int = 0) -> Tensor:
    """What a denoiser draws by DDIM from noise of the shape."""
    scheduler.set_timesteps(STEPS)
    z = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        z = scheduler.step(denoise(z, t, *told), t, z).prev_sample
    return z


@dataclass
class Code:
    """A trained diffusion autoencoder of a world, and its denoiser of codes."""

    task: CodeTask
    prior: Prior
    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """Normalised codes (n, CODE) of images (n, C, H, W) in [-1, 1]."""
        codes = torch.cat([self.task.net.encoder(part) for part in images.split(100)])
        return (codes - self.mean) / self.std

    def draw(self, count: int, seed: int) -> Tensor:
        """New normalised codes."""
        shape = (count, CODE)
        return _drawn(self.task.scheduler, shape, self.prior.denoise, seed=seed)

    def images(self, codes: Tensor, seed: int) -> Tensor:
        """Images in [-1, 1] of normalised codes, each from noise of its own."""
        shape = (len(codes), WORLDS[self.task.options.data][1], self.task.size, self.task.size)
        net = self.task.net
        told = codes * self.std + self.mean
        return _drawn(self.task.scheduler, shape, net.denoise, told, seed=seed)

    def classifier(self, images: Tensor, targets: Tensor, classes: int) -> Linear:
        """Logistic regression on the codes of a few labels."""
        codes = self.of(images).double().numpy()
        return fit_linear(codes, targets.numpy(), classes)

    def accepted(self, found: Linear, each: int, pool: int, seed: int) -> list[Tensor]:
        """Up to `each` images of every class, of codes that the classifier accepts."""
        codes = self.draw(pool, seed)
        p = torch.from_numpy(found.logits(codes.double().numpy())).softmax(1)
        value, of = p.max(1)
        kept = [codes[(of == k) & (value >= LEAST)][:each] for k in range(p.shape[1])]
        shape = (0, WORLDS[self.task.options.data][1], self.task.size, self.task.size)
        return [
            self.images(rows, seed + 1 + k) if len(rows) else torch.zeros(shape)
            for k, rows in enumerate(kept)
        ]

    def mask_maps(self, shots: tuple[Tensor, Tensor], images: Tensor, classes: int) -> np.ndarray:
        """Class maps of images by a network from codes to masks, trained on a few pairs."""
        pixels, masks = shots
        codes = torch.cat([self.of(pixels), self.of(pixels.flip(-1))])
        wanted = torch.cat([masks, masks.flip(-1)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            side = masks.shape[-1]
            last = nn.Linear(256, classes * side * side)
            net = nn.Sequential(nn.Linear(CODE, 256), nn.SiLU(), last)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
        for _ in range(400):
            logits = net(codes).view(len(codes), classes, side, side)
            optimizer.zero_grad()
            F.cross_entropy(logits, wanted).backward()
            optimizer.step()
        with torch.no_grad():
            found = net(self.of(images)).view(len(images), classes, side, side)
        return found.argmax(1).numpy()


def trained_code(world: str, folder: Path, steps: int, batch: int) -> Code:
    """The autoencoder of a world, trained in `folder` first where it is not there yet.

    Of so many steps: another number is another model, in a folder of its own.
    """
    folder = folder.with_name(f"{folder.name}-{steps}")
    torch.manual_seed(0)
    task = CodeTask(world)
    _train(task, folder / "code", steps, batch, "bf16")
    task.net.eval().requires_grad_(False)
    images = torch.cat([_unlabelled(task, first) for first in range(0, 2000, 100)])
    codes = torch.cat([task.net.encoder(part) for part in images.split(100)])
    mean, std = codes.mean(0), codes.std(0).clamp(min=1e-6)
    prior = PriorTask((codes - mean) / std, task)
    _train(prior, folder / "prior", steps, 128)
    return Code(task, prior.net.eval().requires_grad_(False), mean, std)


def _unlabelled(task: CodeTask, first: int) -> Tensor:
    if task.options.data == "digits":
        return digits.split("train")[0][first : first + 100]
    return task.pictures(range(first, first + 100), torch.Generator().manual_seed(first))


def _train(task, folder: Path, steps: int, batch: int, precision: str = "no") -> None:
    """Trains the task's net, or takes over what was trained before."""
    weights = folder / "model" / FILE
    if not weights.exists():
        options = Options(steps=steps, batch=batch, lr=1e-3, precision=precision)
        running = Loop(task, options, folder, quiet=True)
        running.run()
        running.export(weights.parent)
    task.net.load_state_dict(load_file(weights))
