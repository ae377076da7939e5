"""Diffusion models that are known in closed form, at every pixel apart: a mixture, a Gaussian."""

import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

MEAN, STD = 0.5, 0.2  # of the two parts: plus and minus MEAN, equally often, in all pixels apart


class Mixture(UNet2DModel):
    """Predicts the exact noise of x0 with pixels from the mixture, under DDPM's own levels."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        abar = DDPMScheduler().alphas_cumprod.to(sample)[int(timestep)]
        a, var = abar.sqrt(), abar * STD**2 + 1 - abar
        means = torch.tensor([MEAN, -MEAN]).to(sample)[:, None, None, None, None]
        shares = (-((sample - a * means) ** 2) / (2 * var)).softmax(0)
        x0 = (shares * (means + a * STD**2 * (sample - a * means) / var)).sum(0)
        return ((sample - a * x0) / (1 - abar).sqrt(),)


class Gaussian(UNet2DModel):
    """Predicts the exact noise, or velocity, of x0 with pixels from N(centres(), 1)."""

    flow = False

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        a, s = 1 - timestep / 1000, timestep / 1000
        if not self.flow:
            abar = DDPMScheduler().alphas_cumprod.to(sample)[int(timestep)]
            a, s = abar.sqrt(), (1 - abar).sqrt()
        means, var = centres().to(sample), a**2 + s**2
        x0 = means + a / var * (sample - a * means)
        eps = s / var * (sample - a * means)
        return (eps - x0 if self.flow else eps,)


def centres():
    """Means of the Gaussian's pixels, (3, 8, 8)."""
    return torch.linspace(-0.5, 0.5, 192).view(3, 8, 8)


def pipeline(model=Mixture, flow=False):
    """DDPM without clipping, or flow matching, on images of 8x8."""
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    unet = model(
        sample_size=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        **sizes,
    )
    unet.flow = flow
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDPMScheduler(clip_sample=False)
    pipe = DDPMPipeline(unet.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
