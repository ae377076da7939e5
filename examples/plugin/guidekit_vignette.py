"""Vignette: images with dark corners, by a gradient on the estimated clean image.

The form is that of Bansal et al.: Universal guidance for diffusion models, 2023, arXiv:2302.07121:
an energy of the clean image that the denoiser expects, differentiated through the denoiser.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import Guidance, GuidekitError, Run, Step, hookimpl


@dataclass(kw_only=True)
class Vignette(Guidance):
    """Darkens what is far from the centre."""

    scale: float = 30.0  # strength; 0 switches it off
    radius: float = 0.6  # where it begins: 0 is the centre, 1 the corners

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.radius < 1:
            raise GuidekitError(f"{self.name}.radius lies in 0 to 1, without 1, not {self.radius}")

    def prepare(self, run: Run) -> None:
        """Draws the corners (H, W) that are to be dark."""
        self._corners = corners(*run.size, self.radius).to(run.device)

    def energy(self, step: Step) -> Tensor:
        """Brightness of the corners, one number per image (B,)."""
        pixels = step.decode(step.x0)  # (B, 3, H, W) in [-1, 1]
        weights = self._corners.to(pixels.dtype)
        return (pixels.mean(1) * weights).sum((1, 2)) / weights.sum()


def corners(height: int, width: int, radius: float) -> Tensor:
    """Weights (H, W) that grow from 0 at `radius` to 1 at the corners."""
    down = torch.linspace(-1, 1, height)[:, None]
    across = torch.linspace(-1, 1, width)[None]
    distance = ((down**2 + across**2) / 2).sqrt()
    return ((distance - radius) / (1 - radius)).clamp(min=0)


@hookimpl
def register_guidance(register):
    """Offers `vignette`."""
    register("vignette", Vignette)
