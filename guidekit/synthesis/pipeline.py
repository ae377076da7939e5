"""The pipeline of a pixel model of label maps: denoiser, scheduler, and its label set beside."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from guidekit.backbones.maps import one_hot_maps
from guidekit.errors import GuidekitError
from guidekit.labels import LABELS, LabelMap, LabelSet, load_label_set

STEPS, SCALE = 20, 1.5


class MapsPipeline(DiffusionPipeline):
    """Draws images whose pixels have the classes of label maps.

    The UNet2DModel reads the noisy image and the one-hot map of `labels` as further channels; a map
    of zeros is the null of classifier-free guidance (arXiv:2207.12598). The label set is
    labels.json beside the weights.
    """

    def __init__(self, unet: UNet2DModel, scheduler: Any, labels: LabelSet | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        wanted = unet.config.in_channels - unet.config.out_channels
        if labels is None or len(labels) != wanted:
            has = "is not given" if labels is None else f"has {len(labels)}"
            raise GuidekitError(f"this UNet reads maps of {wanted} classes; its label set {has}")
        self.labels = labels

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> "MapsPipeline":
        """The pipeline of a folder. Raises GuidekitError where its label set lacks."""
        path = Path(folder) / LABELS
        if not path.is_file():
            raise GuidekitError(f"{folder} has no {LABELS}, the label set of its maps; add one")
        return super().from_pretrained(folder, labels=load_label_set(path), **options)

    def save_pretrained(self, folder: str | os.PathLike, **options: Any) -> None:
        """Writes the pipeline and its label set."""
        super().save_pretrained(folder, **options)
        self.labels.save(Path(folder) / LABELS)

    @torch.no_grad()
    def __call__(
        self,
        maps: LabelMap | Sequence[LabelMap],
        guidance_scale: float = SCALE,
        num_inference_steps: int = STEPS,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image for each map, at the model's size.

        Raises GuidekitError for maps of another label set or shape.
        """
        maps = [maps] if isinstance(maps, LabelMap) else list(maps)
        side, device, dtype = self.unet.config.sample_size, self._execution_device, self.unet.dtype
        shown = one_hot_maps(maps, self.labels, (side, side)).to(device, dtype)
        shape = (len(maps), self.unet.config.out_channels, side, side)
        z = randn_tensor(shape, generator, device, dtype) * self.scheduler.init_noise_sigma
        guided = guidance_scale > 1
        both = torch.cat([torch.zeros_like(shown), shown]) if guided else shown
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            x = self.scheduler.scale_model_input(torch.cat([z, z]) if guided else z, t)
            out = self.unet(torch.cat([x, both], 1), t, return_dict=False)[0]
            if guided:
                null, cond = out.chunk(2)
                out = null + guidance_scale * (cond - null)
            z = self.scheduler.step(out, t, z, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return self._finished(z, output_type, return_dict)

    def _finished(
        self, z: torch.Tensor, output_type: str, return_dict: bool
    ) -> ImagePipelineOutput | tuple:
        """Pixels (B, 3, H, W) in [-1, 1] as what was asked for."""
        images: Any = (z / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
