"""The safety checker of a pipeline that has one, as the pipeline itself would use it."""

import torch
from torch import Tensor

from guidekit.backbones.denoiser import Denoiser


def flagged(denoiser: Denoiser, images: Tensor) -> list[bool] | None:
    """Which images (B, 3, H, W) in [0, 1] the pipeline's checker would black out; None without one.

    Stable Diffusion's pipelines decide so before they return an image (Rando et al. 2022,
    arXiv:2210.04610, describe the checker).
    """
    pipeline = denoiser.pipeline
    if getattr(pipeline, "safety_checker", None) is None:
        return None
    copies = (2 * images - 1).to(denoiser.device)  # it blackens what it is given
    with torch.no_grad():
        _, found = pipeline.run_safety_checker(copies, denoiser.device, denoiser.dtype)
    return [bool(one) for one in found]


def checked(denoiser: Denoiser, images: Tensor) -> tuple[Tensor, list[bool] | None]:
    """The images, black where the pipeline's checker says so, and which; None without one."""
    black = flagged(denoiser, images)
    if black is None:
        return images, None
    shown = torch.tensor(black, device=images.device)[:, None, None, None]
    return torch.where(shown, torch.zeros_like(images), images), black
