"""Unconditional denoisers of pixels: diffusers' UNet2DModel, v-prediction, cosine schedule.

Ho et al. 2020 (arXiv:2006.11239) for the model, Nichol and Dhariwal 2021 (arXiv:2102.09672) for the
schedule, Salimans and Ho 2022 (arXiv:2202.00512) for the velocity.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image
from torch import Tensor, nn

from guidekit.errors import GuidekitError
from guidekit.images import sheet
from guidekit.worlds import digits, scenes

DATA = ("digits", "scenes")


@dataclass(kw_only=True)
class PixelsOptions:
    """Architecture and data of the denoiser."""

    data: str = "scenes"  # digits | scenes
    channels: tuple[int, ...] = (32, 64, 128)  # one halving of the side between neighbours
    layers: int = 1  # residual blocks per resolution
    attention: int = 1  # resolutions with self-attention, counted from the smallest
    head: int = 32  # channels of an attention head
    groups: int = 16  # of the normalisation
    dropout: float = 0.0
    jitter: float = 0.0  # strength of random rotations, scales and shifts of real images


class VelocityLoss(nn.Module):
    """Error of the predicted velocity."""

    def __init__(self, unet: UNet2DModel):
        super().__init__()
        self.unet = unet

    def forward(self, z: Tensor, timestep: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Mean squared error over z `(B, C, H, W)` at timestep `(B,)`."""
        return {"mse": F.mse_loss(self.unet(z, timestep).sample.float(), v)}


class PixelsTask:
    """Trains an unconditional UNet on digits or scenes."""

    def __init__(self, options: PixelsOptions, size: int):
        if options.data not in DATA:
            raise GuidekitError(f"no data {options.data!r}; there are {', '.join(DATA)}")
        self.options, self.size = options, size
        colours = 1 if options.data == "digits" else 3
        self.net = VelocityLoss(pixel_unet(options, size, colours, colours))
        self.scheduler = cosine_scheduler()

    def pictures(self, numbers: range, generator: torch.Generator) -> Tensor:
        """Clean images `(B, C, size, size)` in [-1, 1]."""
        if self.options.data == "scenes":
            return scenes.batch([scenes.scene(i) for i in numbers], self.size)[0]
        real, _ = digits.split("train")
        chosen = real[torch.randint(len(real), (len(numbers),), generator=generator)]
        return jitter(chosen, self.options.jitter, generator)

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Noisy images, timesteps spread evenly over the batch, velocities."""
        return velocity_batch(self.pictures(numbers, generator), self.scheduler, generator)

    def pipeline(self) -> DDPMPipeline:
        """The trained parts as the pipeline that users load."""
        return DDPMPipeline(self.net.unet, self.scheduler)

    def preview(self) -> Image.Image:
        """Thirty-two images drawn with 25 steps."""
        unet, scheduler = self.net.unet, copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(25)
        shape = (32, unet.config.in_channels, self.size, self.size)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(unet.device)
        unet.eval()
        for timestep in scheduler.timesteps:
            z = scheduler.step(unet(z, timestep).sample.float(), timestep, z).prev_sample
        unet.train()
        return sheet(z, 8)

    def export(self, folder: Path) -> None:
        """Saves the whole pipeline in half precision."""
        pipeline = DDPMPipeline(copy.deepcopy(self.net.unet).eval().half(), self.scheduler)
        pipeline.save_pretrained(folder, safe_serialization=True)


def jitter(pictures: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Images turned, scaled and shifted at random: at 1 by 10 degrees, 10% and 8% of the side."""
    if strength == 0:
        return pictures

    def uniform(largest: float) -> Tensor:
        return (torch.rand(len(pictures), generator=generator) * 2 - 1) * largest * strength

    angle, scale = uniform(np.pi / 18), 1 + uniform(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos, -sin, uniform(0.16), sin, cos, uniform(0.16)]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    where = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    # The free border of a digit is -1, which grid_sample's padding of zeros stands for here.
    return F.grid_sample(pictures + 1, where, align_corners=False) - 1


def cosine_scheduler() -> DDIMScheduler:
    """The schedule of the pixel models: a cosine, v-prediction."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )


def velocity_batch(
    x0: Tensor, scheduler: DDIMScheduler, generator: torch.Generator
) -> dict[str, Tensor]:
    """Noisy images of x0 `(B, C, H, W)`, timesteps spread evenly over the batch, velocities."""
    eps = torch.randn(x0.shape, generator=generator)
    spread = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
    timestep = (spread * scheduler.config.num_train_timesteps).long()
    return {
        "z": scheduler.add_noise(x0, eps, timestep),
        "timestep": timestep,
        "v": scheduler.get_velocity(x0, eps, timestep),
    }


def pixel_unet(options: Any, size: int, inputs: int, outputs: int) -> UNet2DModel:
    """A UNet of so many channels, with self-attention at its smallest resolutions and the middle.

    options: channels, layers, attention, head, groups and dropout as in `PixelsOptions`.
    """
    stages, plain = len(options.channels), len(options.channels) - options.attention
    down = ["DownBlock2D"] * plain + ["AttnDownBlock2D"] * options.attention
    up = ["AttnUpBlock2D"] * options.attention + ["UpBlock2D"] * plain
    return UNet2DModel(
        sample_size=size,
        in_channels=inputs,
        out_channels=outputs,
        block_out_channels=options.channels,
        down_block_types=tuple(down[:stages]),
        up_block_types=tuple(up[:stages]),
        layers_per_block=options.layers,
        attention_head_dim=options.head,
        norm_num_groups=options.groups,
        dropout=options.dropout,
    )
