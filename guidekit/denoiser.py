"""A diffusers text-to-image UNet pipeline as one call: texts, model outputs, pictures.

The pipeline's own `encode_prompt`, VAE and image processor do the work, so what they do stays what
they do in diffusers. Stable Diffusion 1.x, 2.x and SDXL.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from guidekit.backbones import Family, family_of, layout_sites
from guidekit.conditions import Condition


@dataclass(frozen=True)
class Text:
    """Encoded prompts of B pictures: states (B, T, D) and what SDXL adds to them."""

    states: Tensor
    pooled: Tensor | None = None  # (B, D')
    time_ids: Tensor | None = None  # (B, 6)

    def kwargs(self) -> dict:
        """Arguments of the UNet's forward."""
        if self.pooled is None:
            return {"encoder_hidden_states": self.states}
        added = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        return {"encoder_hidden_states": self.states, "added_cond_kwargs": added}

    @staticmethod
    def cat(texts: list["Text"]) -> "Text":
        """The texts one after the other along the batch."""
        if len(texts) == 1:
            return texts[0]
        columns = zip(*((t.states, t.pooled, t.time_ids) for t in texts), strict=True)
        return Text(*(None if c[0] is None else torch.cat(c) for c in columns))


class Denoiser:
    """The model of a live pipeline, its texts and its autoencoder.

    Raises ValueError for a pipeline whose denoiser is not a text-conditional UNet of Stable
    Diffusion or SDXL, and for a distilled one that takes the guidance scale as an input.
    """

    families: ClassVar[tuple[str, ...]] = ("sd", "sdxl")

    def __init__(self, pipeline: DiffusionPipeline):
        model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        self.family: Family | None = None if model is None else family_of(model)
        if self.family is None or self.family.name not in self.families:
            raise ValueError(
                f"{type(pipeline).__name__} cannot be used yet; this takes pipelines of the "
                f"families {', '.join(self.families)}"
            )
        if getattr(model.config, "time_cond_proj_dim", None) is not None:
            raise ValueError(
                "this model is distilled with the guidance scale as an input (time_cond_proj_dim);"
                " use the model that it was distilled from"
            )
        self.pipeline, self.model, self.vae = pipeline, model, pipeline.vae

    @property
    def dtype(self) -> torch.dtype:
        """Type of the latents, as the pipeline has it: that of the text states."""
        return self.pipeline.text_encoder.dtype

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return self.pipeline._execution_device

    @property
    def tokenizers(self) -> list:
        """Tokenizers in the order of the text encoders."""
        second = getattr(self.pipeline, "tokenizer_2", None)
        return [self.pipeline.tokenizer] + ([] if second is None else [second])

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture; None stands for the model's own size.

        Raises ValueError for a size that is no multiple of 8 or of the autoencoder's factor.
        """
        factor = self.pipeline.vae_scale_factor
        own = self.model.config.sample_size
        own = (own, own) if isinstance(own, int) else tuple(own)
        size = [side or o * factor for side, o in zip((height, width), own, strict=True)]
        if any(side <= 0 or side % max(8, factor) for side in size):
            raise ValueError(
                f"height and width must be multiples of {max(8, factor)}, not {size[0]}x{size[1]}"
            )
        return (self.model.config.in_channels, size[0] // factor, size[1] // factor)

    def layout_grids(self, height: int | None = None, width: int | None = None) -> list[tuple]:
        """Grids (h, w) of the default layout sites, for a picture of that size."""
        _, h, w = self.latent_shape(height, width)
        return sorted(set(layout_sites(self.model, h, w).values()))

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> Text:
        """Encodes prompts for pictures of `size` (height, width); `null` for negative ones.

        SDXL's null is zeros where the prompt is empty and the pipeline's config says so.
        """
        with torch.no_grad():
            if self.family.name == "sd":
                return Text(self.pipeline.encode_prompt(prompts, self.device, 1, False)[0])
            states, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, device=self.device, num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )  # fmt: skip
        if null and self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not p for p in prompts], device=states.device)
            states = states.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        return Text(states, pooled, self._time_ids(size, len(prompts), states.dtype))

    def _time_ids(self, size: tuple[int, int], count: int, dtype: torch.dtype) -> Tensor:
        """SDXL's original size, crop and target size, all for an uncropped picture."""
        projection = self.pipeline.text_encoder_2.config.projection_dim
        ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype=dtype, text_encoder_projection_dim=projection
        )
        return ids.to(self.device).repeat(count, 1)

    def check(self, conditions: list[Condition]) -> None:
        """Raises ValueError for what the text encoders would silently cut off."""
        tokenizer = self.tokenizers[0]
        for text in {text for c in conditions for text in (c.prompt, c.negative)}:
            count = len(tokenizer(text)["input_ids"])
            if count > tokenizer.model_max_length:
                raise ValueError(
                    f"the prompt has {count} tokens, the text encoder reads "
                    f"{tokenizer.model_max_length}; shorten {text!r}"
                )

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The model's output (B, C, h, w) for scaled latents z (B, C, h, w)."""
        return self.model(z, timestep, return_dict=False, **text.kwargs())[0]

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of finished latents, exactly as the pipeline does it."""
        with torch.no_grad():
            if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
                with _in_float32(self.vae):
                    pixels = self.vae.decode(self._unscale(z.float()), return_dict=False)[0]
            else:
                z = z.to(self.vae.dtype)
                pixels = self.vae.decode(self._unscale(z), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(pixels, output_type="pt")

    @cached_property
    def _wide_vae(self) -> nn.Module:
        """The autoencoder in float32 or better: a copy of a half one, whose backward needs it."""
        if self.vae.dtype in (torch.float32, torch.float64):
            return self.vae
        return copy.deepcopy(self.vae).float().eval().requires_grad_(False)

    def pixels(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of clean latents x0, in float32 and with gradient."""
        vae = self._wide_vae
        return vae.decode(self._unscale(x0.to(vae.dtype)), return_dict=False)[0]

    def latents(self, pixels: Tensor) -> Tensor:
        """Clean latents x0 of pictures (B, 3, H, W) in [-1, 1], in float32 and with gradient."""
        vae = self._wide_vae
        x0 = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
        mean, std = self._statistics(x0)
        return (x0 - mean) / std * vae.config.scaling_factor

    def _unscale(self, z: Tensor) -> Tensor:
        shift = getattr(self.vae.config, "shift_factor", None)
        if shift is not None:  # SD3 and Flux
            return z / self.vae.config.scaling_factor + shift
        if getattr(self.vae.config, "latents_mean", None) is None:
            return z / self.vae.config.scaling_factor
        mean, std = self._statistics(z)
        return z * std / self.vae.config.scaling_factor + mean

    def _statistics(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation of the latents' channels where the autoencoder has them."""
        config = self.vae.config
        if getattr(config, "latents_mean", None) is None:
            return getattr(config, "shift_factor", None) or 0.0, 1.0
        both = torch.tensor([config.latents_mean, config.latents_std], device=z.device)
        mean, std = both.to(z.dtype).view(2, 1, -1, 1, 1)
        return mean, std


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """The model in float32 for a while; half precision overflows in SDXL's decoder."""
    before = model.dtype
    if before in (torch.float32, torch.float64):
        yield
        return
    model.to(torch.float32)
    try:
        yield
    finally:
        model.to(before)


@contextlib.contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient and no layer drops out for a while."""
    weights = [p for m in models for p in m.parameters() if p.requires_grad]
    training = [m for model in models for m in model.modules() if m.training]
    for p in weights:
        p.requires_grad_(False)
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
        for m in training:
            m.training = True
