"""The pipeline of a Semantica model: denoiser, scheduler, frozen image encoder."""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from guidekit.references import square, to_pixels
from guidekit.semantica.encode import ImageEncoder
from guidekit.semantica.model import UViT
from guidekit.semantica.schedule import SemanticaScheduler

STEPS, W = 64, 0.5


class SemanticaPipeline(DiffusionPipeline):
    """Makes, from each given image, another with the same semantics.

    w: guidance factor, (1 + w) cond - w null, 0 for none, 0.5 the paper's; diffusers' guidance
    scale is 1 + w. guidekit draws with it in its own loop too, where plugins act on it.
    """

    model_cpu_offload_seq = "encoder->unet"

    def __init__(self, unet: UViT, scheduler: SemanticaScheduler, encoder: ImageEncoder):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, encoder=encoder)

    def states(self, pixels: Tensor) -> Tensor:
        """What the denoiser is told of pixels (B, 3, H, W) in [-1, 1]: (B, T, D)."""
        with torch.no_grad():
            tokens, pooled = self.encoder(pixels.to(self._execution_device))
        film = self.unet.config.conditioning == "film"
        states = pooled[:, None] if film else tokens
        return states.to(self._execution_device, self.unet.dtype)

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | list[Image.Image] | Tensor,
        w: float = W,
        num_inference_steps: int = STEPS,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image for each reference; a Tensor is (B, 3, H, W) in [0, 1]."""
        pixels = self._references(image)
        images = denoise(
            self.unet,
            self.scheduler,
            self.states(pixels),
            w,
            num_inference_steps,
            generator,
            self.progress_bar,
        )
        self.maybe_free_model_hooks()
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _references(self, image: Image.Image | list[Image.Image] | Tensor) -> Tensor:
        """Pixels (B, 3, s, s) in [-1, 1] of the references' largest squares."""
        if isinstance(image, Tensor):
            return image * 2 - 1
        images = [image] if isinstance(image, Image.Image) else image
        return to_pixels(torch.stack([square(i, self.encoder.config.image_size) for i in images]))


def denoise(
    unet: UViT,
    scheduler: SemanticaScheduler,
    states: Tensor,
    w: float,
    steps: int,
    generator,
    bar=iter,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] for states (B, T, D), zeros being no condition.

    Drawn on the device of the states: an offloaded model's weights lie on another.
    """
    side, batch, device = unet.config.sample_size, len(states), states.device
    scheduler.set_timesteps(steps, device=device)
    z = randn_tensor((batch, 3, side, side), generator, device, unet.dtype)
    both = states if w == 0 else torch.cat([torch.zeros_like(states), states])
    for t in bar(scheduler.timesteps):
        out = unet(z if w == 0 else torch.cat([z, z]), t, both, return_dict=False)[0]
        if w:
            null, cond = out.chunk(2)
            out = null + (1 + w) * (cond - null)
        z = scheduler.step(out, t, z, generator=generator, return_dict=False)[0]
    return (z / 2 + 0.5).clamp(0, 1)
