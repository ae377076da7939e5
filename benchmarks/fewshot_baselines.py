"""What few-shot guidance is compared with: pixel classifiers, a random denoiser, a segmenter."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guidekit import Denoiser, Guidance, Step
from guidekit.heads.features import noised, observe
from guidekit.heads.fit import NOISED_TIMESTEPS
from guidekit.heads.head import Head
from guidekit.heads.linear import Linear, fit_linear


@dataclass(kw_only=True)
class ByLogits(Guidance):
    """Cross-entropy of any differentiable logits of a step (Dhariwal and Nichol 2021)."""

    scale: float = 25.0
    source: str = "x0"  # what `logits` reads: x0 | input

    targets: ClassVar[Tensor]
    logits: ClassVar[Callable[[Step], Tensor]]

    @property
    def graph(self) -> str:
        """The clean estimate's graph, or none of the backbone."""
        return self.source

    def energy(self, step: Step) -> Tensor:
        """Cross-entropy (B,)."""
        return F.cross_entropy(self.logits(step), self.targets, reduction="none")


def by_logits(
    logits: Callable[[Step], Tensor],
    targets: Tensor,
    scale: float,
    source: str,
    start: float = 0.0,
) -> ByLogits:
    """A guidance to classes (B,) from a function of a step to logits (B, classes)."""
    guidance = ByLogits(scale=scale, source=source, start=start)
    guidance.logits, guidance.targets = logits, targets
    return guidance


class LinearPixels:
    """Logistic regression on flattened pixels, as a torch function."""

    def __init__(self, found: Linear):
        names = ("mean", "std", "weight", "bias")
        self.parts = {n: torch.from_numpy(getattr(found, n)).float() for n in names}
        self.temperature = found.temperature

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        p = self.parts
        flat = (x.flatten(1) - p["mean"]) / p["std"]
        return (flat @ p["weight"].T + p["bias"]) / self.temperature


def clean_pixels(pictures: Tensor, targets: Tensor, classes: int) -> LinearPixels:
    """A classifier of clean images, to be applied to the clean estimate ("DDIM-I")."""
    x = pictures.flatten(1).double().numpy()
    return LinearPixels(fit_linear(x, targets.numpy(), classes))


def noised_pixels(
    denoiser: Denoiser, pictures: Tensor, targets: Tensor, classes: int, copies: int = 8
) -> Callable[[Step], Tensor]:
    """Classifiers of noisy images, one for each of some timesteps, on the sampler's own z."""
    generator = torch.Generator().manual_seed(0)
    x0, y = pictures.repeat(copies, 1, 1, 1), targets.repeat(copies)
    groups = np.tile(np.arange(len(pictures)), copies)
    known = {}
    for t in NOISED_TIMESTEPS:
        eps = torch.randn(x0.shape, generator=generator)
        x = noised(denoiser, x0, t, eps).flatten(1).double().numpy()
        enough = len(pictures) > classes
        found = fit_linear(x, y.numpy(), classes, groups=groups if enough else None)
        known[t] = LinearPixels(found)

    def logits(step: Step) -> Tensor:
        nearest = min(known, key=lambda t: abs(t - float(step.timestep)))
        return known[nearest](step.z)

    return logits


def other_features(head: Head, other: Denoiser) -> Callable[[Step], Tensor]:
    """The head on the features that another denoiser has of the clean estimate."""
    return lambda step: head(observe(other, step.x0, head.config.reading))


def random_twin(denoiser: Denoiser) -> Denoiser:
    """A denoiser of the same architecture that was never trained."""
    pipeline, model = denoiser.pipeline, denoiser.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = type(model).from_config(model.config).eval().requires_grad_(False)
    return Denoiser(type(pipeline)(twin, pipeline.scheduler))


class Segmenter(nn.Module):
    """A small U-shaped network, trained from scratch on the same pairs as a mask head."""

    def __init__(self, classes: int, width: int = 24):
        super().__init__()
        self.a, self.b = _block(3, width), _block(width, 2 * width)
        self.c, self.d = _block(2 * width, 2 * width), _block(4 * width, 2 * width)
        self.e, self.last = _block(3 * width, width), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of images (B, 3, H, W)."""
        a = self.a(x)
        b = self.b(F.avg_pool2d(a, 2))
        c = self.c(F.avg_pool2d(b, 2))
        d = self.d(torch.cat([F.interpolate(c, scale_factor=2), b], 1))
        return self.last(self.e(torch.cat([F.interpolate(d, scale_factor=2), a], 1)))


def _block(inputs: int, outputs: int) -> nn.Module:
    convolutions = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, 1, 1)]
    norms = [nn.GroupNorm(8, outputs) for _ in range(2)]
    return nn.Sequential(convolutions[0], norms[0], nn.SiLU(), convolutions[1], norms[1], nn.SiLU())


def train_segmenter(pictures: Tensor, masks: Tensor, classes: int, steps: int = 400) -> Segmenter:
    """A segmenter of images (n, 3, H, W) and masks (n, H, W), with flips and brightness."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Segmenter(classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(steps):
        index = torch.randint(len(pictures), (8,), generator=generator)
        x, y = pictures[index], masks[index]
        factor = 0.5 + torch.rand(len(x), 1, 1, 1, generator=generator)
        x = ((x + 1) * factor - 1).clamp(-1, 1)
        if torch.rand((), generator=generator) < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
