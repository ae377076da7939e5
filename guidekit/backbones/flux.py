"""Flux: packed latents, joint attention with T5, the guidance scale as an input."""

import copy

import torch
from torch import Tensor

from guidekit.backbones.base import Text
from guidekit.backbones.packed import PackedLatents, set_flow_timesteps
from guidekit.backbones.text import TextDenoiser
from guidekit.backbones.tokenizers import KeyTokenizer, expanding


class Flux(PackedLatents, TextDenoiser, families=("flux",)):
    """Flux.1: distilled, so that cfg is 1 and `embedded_cfg` an input of the model."""

    cfg = 1.0
    encoders = ("text_encoder_2",)
    embedded_cfg: float | None = None  # the pipeline's default if None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the latents: that of the text states."""
        return self.pipeline.text_encoder_2.dtype

    def key_tokenizers(self, length: int) -> list:
        """The tokenizer of T5; CLIP's states are pooled."""
        return [KeyTokenizer([(expanding(self.pipeline, self.pipeline.tokenizer_2), length)])]

    def with_embedded_cfg(self, scale: float) -> "Flux":
        """A view of this denoiser with another guidance scale as an input of the model."""
        if not self.model.config.guidance_embeds:
            return super().with_embedded_cfg(scale)
        other = copy.copy(self)
        other.embedded_cfg = scale
        return other

    def set_timesteps(
        self, scheduler, steps: int, shape: tuple[int, int, int], **own: list[float]
    ) -> None:
        """Lays out the steps from 1 to 1 / steps, shifted by the size of the image."""
        tokens = (shape[1] // 2) * (shape[2] // 2)
        set_flow_timesteps(scheduler, steps, self.device, tokens, keeps=True, who="Flux", **own)

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
        out = self.network(
            self.pack(z),
            timestep=timestep.expand(len(z)).to(z.dtype) / 1000,
            img_ids=self.pipeline._prepare_latent_image_ids(len(z), h, w, **kind),
            txt_ids=torch.zeros(text.states.shape[1], 3, **kind),
            return_dict=False,
            **text.kwargs(),
        )[0]
        return self.unpack(out, tuple(z.shape[2:]))
