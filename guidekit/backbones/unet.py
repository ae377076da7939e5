"""Stable Diffusion 1.x and 2.x, and SDXL: UNets that cross-attend to CLIP."""

import torch
from torch import Tensor

from guidekit.backbones.base import Text
from guidekit.backbones.text import TextDenoiser
from guidekit.backbones.tokenizers import expanding
from guidekit.errors import GuidekitError


class StableDiffusion(TextDenoiser, families=("sd",)):
    """Stable Diffusion 1.x and 2.x."""

    takes_controls = True

    def check_own_loop(self) -> None:
        """Raises GuidekitError, too, for a model that takes the guidance scale as an input."""
        super().check_own_loop()
        if getattr(self.model.config, "time_cond_proj_dim", None) is not None:
            raise GuidekitError(
                "this model is distilled with the guidance scale as an input (time_cond_proj_dim), "
                "which its pipeline gives it: call the pipeline inside guidekit.attach, or use the "
                "model that it was distilled from"
            )

    @property
    def text_length(self) -> int:
        """Number of text tokens that pixels attend to."""
        return self.pipeline.tokenizer.model_max_length

    def key_tokenizers(self, length: int) -> list:
        """The tokenizer of CLIP."""
        return [expanding(self.pipeline, self.pipeline.tokenizer)]

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> Text:
        """The encoded prompts."""
        with torch.no_grad():
            states = self.pipeline.encode_prompt(prompts, self.device, 1, False)[0]
        return Text({"encoder_hidden_states": states})


class StableDiffusionXL(StableDiffusion, families=("sdxl",)):
    """SDXL: two text encoders joined in channels, a pooled one, sizes."""

    encoders = ("text_encoder", "text_encoder_2")

    def key_tokenizers(self, length: int) -> list:
        """The tokenizers of both text encoders; each token has one key. The refiner has one."""
        both = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        return [expanding(self.pipeline, t) for t in both if t is not None]

    @property
    def text_length(self) -> int:
        """Number of text tokens that pixels attend to."""
        return self.key_tokenizers(0)[0].model_max_length

    @property
    def dtype(self) -> torch.dtype:
        """Type of the latents: that of the text states."""
        return self.pipeline.text_encoder_2.dtype

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> Text:
        """The encoded prompts; a null is zeros where it is empty and the pipeline says so."""
        with torch.no_grad():
            states, _, pooled, _ = self.pipeline.encode_prompt(
                prompts,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        if null and self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not p for p in prompts], device=states.device)
            states = states.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        added = {"text_embeds": pooled, "time_ids": self._time_ids(size, len(prompts), states)}
        return Text({"encoder_hidden_states": states, "added_cond_kwargs": added})

    def _time_ids(self, size: tuple[int, int], count: int, states: Tensor) -> Tensor:
        """Original size, crop and target size, all for an uncropped image."""
        projection = self.pipeline.text_encoder_2.config.projection_dim
        ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype=states.dtype, text_encoder_projection_dim=projection
        )
        return ids.to(self.device).repeat(count, 1)
