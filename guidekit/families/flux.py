"""Flux: packed latents, joint attention with T5, the guidance scale as an input."""

import copy
import inspect

import numpy as np
import torch
from torch import Tensor

from guidekit.families.base import Text
from guidekit.families.flow import dynamic_shift
from guidekit.families.text import TextDenoiser
from guidekit.tokens import KeyTokenizer


class Flux(TextDenoiser, families=("flux",)):
    """Flux.1: distilled, so that cfg is 1 and `embedded_cfg` an input of the model."""

    cfg = 1.0
    embedded_cfg: float | None = None  # the pipeline's default if None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the latents: that of the text states."""
        return self.pipeline.text_encoder_2.dtype

    @property
    def channels(self) -> int:
        """Channels of the latents before packing."""
        return self.model.config.in_channels // 4

    @property
    def multiple(self) -> int:
        """Latents are packed two by two."""
        return self.factor * 2

    @property
    def own_size(self) -> tuple[int, int]:
        """Height and width of the latents by default."""
        return (self.pipeline.default_sample_size,) * 2

    def key_tokenizers(self, length: int) -> list:
        """The tokenizer of T5; CLIP's states are pooled."""
        return [KeyTokenizer([(self.pipeline.tokenizer_2, length)])]

    def with_embedded_cfg(self, scale: float) -> "Flux":
        """A view of this denoiser with another guidance scale as an input of the model."""
        if not self.model.config.guidance_embeds:
            return super().with_embedded_cfg(scale)
        other = copy.copy(self)
        other.embedded_cfg = scale
        return other

    def set_timesteps(self, scheduler, steps: int, shape: tuple[int, int, int]) -> None:
        """Lays out the steps from 1 to 1 / steps, shifted by the size of the picture."""
        config = scheduler.config
        given = {}
        if not config.get("use_flow_sigmas", False):
            if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(scheduler).__name__} takes no sigmas, which Flux sets")
            given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        if config.get("use_dynamic_shifting", False):
            tokens = (shape[1] // 2) * (shape[2] // 2)
            given["mu"] = dynamic_shift(scheduler, tokens, max_shift=1.15)
        count = {} if "sigmas" in given else {"num_inference_steps": steps}
        scheduler.set_timesteps(device=self.device, **count, **given)

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> Text:
        """The states of T5, CLIP's pooled ones, and the scale for models that read it."""
        with torch.no_grad():
            states, pooled, _ = self.pipeline.encode_prompt(
                prompts, device=self.device, max_sequence_length=self.text_length
            )
        given = {"encoder_hidden_states": states, "pooled_projections": pooled}
        if self.model.config.guidance_embeds:
            scale = self.embedded_cfg
            scale = self.pipeline_default("guidance_scale") if scale is None else scale
            given["guidance"] = torch.full([len(prompts)], scale, device=self.device)
        return Text(given)

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The model's velocity (B, C, h, w)."""
        h, w = z.shape[2] // 2, z.shape[3] // 2
        kind = {"device": z.device, "dtype": z.dtype}
        out = self.model(
            self.pack(z),
            timestep=timestep.expand(len(z)).to(z.dtype) / 1000,
            img_ids=self.pipeline._prepare_latent_image_ids(len(z), h, w, **kind),
            txt_ids=torch.zeros(text.states.shape[1], 3, **kind),
            return_dict=False,
            **text.kwargs(),
        )[0]
        return self.unpack(out, tuple(z.shape[2:]))

    def unpack(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents (B, C, h, w) out of 2x2 patches (B, N, 4C)."""
        x = x.unflatten(1, (grid[0] // 2, grid[1] // 2)).unflatten(3, (-1, 2, 2))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # from (B, h, w, C, 2, 2)

    def pack(self, z: Tensor) -> Tensor:
        """2x2 patches (B, N, 4C) of latents (B, C, h, w)."""
        z = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h, 2, w, 2)
        return z.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
