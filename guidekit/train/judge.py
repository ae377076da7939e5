"""The judge of the scenes world: segments images into 48 kinds of objects; it never guides.

One convolutional network with a U-shaped path for the class of every pixel and a pooled bottleneck
whose 64 numbers serve as features for the Frechet and kernel distances.
"""

import colorsys
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

from guidekit.images import sheet
from guidekit.train.worlds import SHAPES, World
from guidekit.worlds import scenes

FEATURES = 64


@dataclass(kw_only=True)
class JudgeOptions:
    """Width of the judge and how strongly its training images are degraded."""

    width: int = 32
    noise: float = 0.08  # largest standard deviation of pixel noise, images in [-1, 1]
    blur: float = 0.5  # share of images that are shrunk and enlarged again
    source: str = "scenes"  # scenes | dense | prints | cutouts
    cutouts: str = ""  # folder of the cut-outs; `guidekit train --cutouts` sets it


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, group normalisation, activation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()
    )


class Judge(ModelMixin, ConfigMixin):
    """Class logits of every pixel and pooled features of images of any size from 32x32."""

    @register_to_config
    def __init__(self, width: int = 32, classes: int = len(scenes.CLASSES) + 1):
        super().__init__()
        w = width
        self.stem = _block(3, w)
        self.down1 = nn.Sequential(_block(w, 2 * w, 2), _block(2 * w, 2 * w))
        self.down2 = nn.Sequential(_block(2 * w, 2 * w, 2), _block(2 * w, 2 * w))
        self.down3 = nn.Sequential(_block(2 * w, 2 * w, 2), _block(2 * w, FEATURES))
        self.up2 = _block(FEATURES + 2 * w, 2 * w)
        self.up1 = _block(4 * w, 2 * w)
        self.up0 = _block(3 * w, w)
        self.head = nn.Conv2d(w, classes, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `(B, 3, H, W)` in [-1, 1] to logits `(B, 49, H, W)` and features `(B, 64)`."""
        x0 = self.stem(pixels)
        x1 = self.down1(x0)
        x2 = self.down2(x1)
        x3 = self.down3(x2)
        y2 = self.up2(torch.cat([_double(x3), x2], 1))
        y1 = self.up1(torch.cat([_double(y2), x1], 1))
        y0 = self.up0(torch.cat([_double(y1), x0], 1))
        return self.head(y0), x3.mean((2, 3))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class JudgeLoss(nn.Module):
    """Cross-entropy of the pixels' classes."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss of images `(B, 3, H, W)` against class maps `(B, H, W)`."""
        logits, _ = self.judge(pixels)
        return {"cross_entropy": F.cross_entropy(logits.float(), labels)}


class JudgeTask:
    """Trains the judge on degraded scenes of its own split, in turns at both sizes."""

    def __init__(
        self, options: JudgeOptions, sizes: tuple[int, ...] = (64, 32), world: World = SHAPES
    ):
        self.options, self.sizes, self.world = options, sizes, world
        self.net = JudgeLoss(Judge(options.width, len(world.classes) + 1))

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Degraded images and the class of every pixel, all of one size."""
        size = self.sizes[(numbers.start // len(numbers)) % len(self.sizes)]
        plans = [self.world.scene(i, "judge") for i in numbers]
        pixels, labels = self.world.images_and_labels(plans, size)
        return {"pixels": degrade(pixels, self.options, generator), "labels": labels}

    def preview(self) -> Image.Image:
        """Held-out scenes above the colour of every pixel's class."""
        plans = [self.world.scene(i, "test") for i in range(8)]
        pixels = self.world.images(plans, self.sizes[0])
        device = next(self.net.parameters()).device
        found = self.net.judge(pixels.to(device))[0].argmax(1).cpu()
        shown = torch.tensor([(90, 90, 90), *_palette(self.world)], dtype=torch.uint8)[found]
        return sheet(torch.cat([pixels, scenes.pixels(shown)]), 8)

    def export(self, folder: Path) -> None:
        """Saves the judge in half precision."""
        copy.deepcopy(self.net.judge).half().save_pretrained(folder)


def _palette(world: World) -> list[tuple[int, int, int]]:
    """A colour for each class: that of a shape, else hues in turn."""
    if world is SHAPES:
        return [scenes.COLOURS[name.split()[0]] for name in world.classes]
    hues = [i * 0.618 % 1 for i in range(len(world.classes))]
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.7, 0.9)) for hue in hues]


def degrade(pixels: Tensor, options: JudgeOptions, generator: torch.Generator) -> Tensor:
    """Noise, a change of contrast and brightness, and a loss of detail, each drawn per image."""
    batch = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, 1, 1, 1, generator=generator) * (high - low) + low

    small = F.interpolate(pixels, scale_factor=0.5, mode="area")
    soft = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
    pixels = torch.where(uniform(0, 1) < options.blur, pixels.lerp(soft, uniform(0, 1)), pixels)
    noise = torch.randn(pixels.shape, generator=generator)
    return pixels * uniform(0.9, 1.1) + uniform(-0.08, 0.08) + noise * uniform(0, options.noise)
