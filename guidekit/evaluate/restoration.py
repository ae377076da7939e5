"""How near an image is to another, pixel by pixel: PSNR and SSIM, of inverse problems."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian
C1, C2 = 0.01**2, 0.03**2  # for values from 0 to 1


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (n, C, H, W) in [0, 1], at most 100: (n,)."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images (n, C, H, W) in [0, 1], of at least 11 pixels a side: (n,).

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity";
    each channel by itself, windows that lie within the image.
    """
    channels = a.shape[1]
    steps = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    line = torch.exp(-(steps**2) / (2 * SIGMA**2))
    window = torch.outer(line, line) / line.sum() ** 2
    weight = window.expand(channels, 1, WINDOW, WINDOW)

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, groups=channels)

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    both = local(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + C1) * (2 * both + C2)
    scale = (mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2)
    return (alike / scale).flatten(1).mean(1)
