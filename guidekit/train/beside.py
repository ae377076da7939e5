"""What is trained beside a frozen Stable Diffusion backbone: its own loss, and noisy batches."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from guidekit.train.targets import model_target


class BesideLoss(nn.Module):
    """The backbone's own loss; a subclass holds what is trained, and is given only that."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.frozen = [unet]  # in a list, so that it is no part of the module

    @property
    def unet(self) -> nn.Module:
        """The backbone's denoiser."""
        return self.frozen[0]

    def error(
        self, z: Tensor, timestep: Tensor, states: Tensor, target: Tensor, **given: object
    ) -> dict[str, Tensor]:
        """Error at latents z (B, C, h, w) and text states (B, T, D). given: to the denoiser."""
        out = self.unet(z, timestep, states, **given, return_dict=False)[0]
        return {"mse": F.mse_loss(out.float(), target)}


class Backbone:
    """A pipeline whose weights stay as they are: latents, text states and noise of batches."""

    def __init__(self, pipeline: StableDiffusionPipeline):
        self.pipeline = pipeline
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.eval().requires_grad_(False)
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        #: Timesteps that it was trained on.
        self.timesteps: int = self.scheduler.config.num_train_timesteps

    @torch.no_grad()
    def encoded(self, x0: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1], text states; on the CPU."""
        pipeline = self.pipeline
        latents = pipeline.vae.encode(x0.to(pipeline.device)).latent_dist.mode().cpu()
        states = pipeline.encode_prompt(texts, pipeline.device, 1, False)[0].cpu()
        return latents.float() * pipeline.vae.config.scaling_factor, states

    def noisy(self, latents: Tensor, eps: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """What `BesideLoss.error` takes at timestep (B,), but for the text states."""
        return {
            "z": self.scheduler.add_noise(latents, eps, timestep),
            "timestep": timestep,
            "target": model_target(self.scheduler, latents, eps, timestep),
        }


def with_words(captions: list[str], wordless: float, generator: torch.Generator) -> list[str]:
    """The captions, of which a share is replaced by the empty prompt."""
    words = torch.rand(len(captions), generator=generator) >= wordless
    return [text if keep else "" for text, keep in zip(captions, words.tolist(), strict=True)]
