"""The judge of the digits: a small classifier trained on a split of its own; it never guides."""

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
from guidekit.train.pixels import jitter
from guidekit.worlds import digits


@dataclass(kw_only=True)
class DigitsOptions:
    """Width of the classifier and how strongly its training images are degraded."""

    width: int = 32
    features: int = 32
    dropout: float = 0.3
    jitter: float = 1.0  # as in guidekit.train.pixels
    noise: float = 0.3  # largest standard deviation of pixel noise, images in [-1, 1]
    data: str = "judge"  # split to train on


class DigitJudge(ModelMixin, ConfigMixin):
    """Class logits and pooled features of 8x8 digits."""

    @register_to_config
    def __init__(self, width: int = 32, features: int = 32, dropout: float = 0.3):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            nn.Conv2d(1, w, 3, padding=1),
            nn.GroupNorm(4, w),
            nn.SiLU(),
            nn.Conv2d(w, 2 * w, 3, 2, 1),
            nn.GroupNorm(4, 2 * w),
            nn.SiLU(),
            nn.Conv2d(2 * w, 2 * w, 3, padding=1),
            nn.GroupNorm(4, 2 * w),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32 * w, features),
            nn.Tanh(),
        )
        self.head = nn.Linear(features, 10)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `(B, 1, 8, 8)` in [-1, 1] to logits `(B, 10)` and features `(B, 32)`."""
        features = self.body(pixels)
        return self.head(features), features


class DigitsLoss(nn.Module):
    """Cross-entropy of the digits' classes."""

    def __init__(self, judge: DigitJudge):
        super().__init__()
        self.judge = judge

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss of images `(B, 1, 8, 8)` against classes `(B,)`."""
        return {"cross_entropy": F.cross_entropy(self.judge(pixels)[0].float(), labels)}


class DigitsTask:
    """Trains the classifier on turned, shifted and noisy digits."""

    def __init__(self, options: DigitsOptions):
        self.options = options
        self.pictures, self.labels = digits.split(options.data)
        self.net = DigitsLoss(DigitJudge(options.width, options.features, options.dropout))

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Degraded images and their classes."""
        chosen = torch.randint(len(self.labels), (len(numbers),), generator=generator)
        pixels = jitter(self.pictures[chosen], self.options.jitter, generator)
        strength = torch.rand(len(chosen), 1, 1, 1, generator=generator) * self.options.noise
        pixels = pixels + strength * torch.randn(pixels.shape, generator=generator)
        return {"pixels": pixels, "labels": self.labels[chosen]}

    def preview(self) -> Image.Image:
        """Images of the test split that it takes for another digit."""
        pixels, labels = digits.split("test")
        self.net.eval()
        found = self.net.judge(pixels.to(next(self.net.parameters()).device))[0].argmax(1).cpu()
        self.net.train()
        wrong = (found != labels).nonzero().flatten()[:16]
        return sheet(pixels[wrong if len(wrong) else [0]], 8)

    def export(self, folder: Path) -> None:
        """Saves the classifier in half precision."""
        copy.deepcopy(self.net.judge).half().save_pretrained(folder)
