"""Sana: linear attention among pixels, cross-attention to Gemma 2, 32-fold compression."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from guidekit.backbones.base import Text
from guidekit.backbones.text import TextDenoiser
from guidekit.backbones.tokenizers import TemplateTokenizer
from guidekit.conditions import Condition


class Sana(TextDenoiser, families=("sana",)):
    """SanaPipeline, at the size that is asked for (use_resolution_binning=False).

    Prompts are in small letters, after an instruction to the text encoder. Of that the model sees
    the first token only.
    """

    cfg = 4.5

    @property
    def dtype(self) -> torch.dtype:
        """Type of the latents: float32 also beside a model in half precision."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def multiple(self) -> int:
        """The pipeline takes multiples of 32."""
        return math.lcm(32, self.factor * self.model.config.patch_size)

    @property
    def _instruction(self) -> str:
        return "\n".join(self.pipeline_default("complex_human_instruction"))

    def key_tokenizers(self, length: int) -> list:
        """Gemma's tokenizer: its first token, then those from the end of the instruction on."""
        gemma, before = self.pipeline.tokenizer, self._instruction
        # As in the pipeline: counted without the prompt, whose first token may take its last space.
        start = len(gemma(before)["input_ids"]) - 1
        return [TemplateTokenizer(gemma, length, before, lead=1, start=start)]

    def read_text(self, prompt: str, tokenizer) -> str:
        """The prompt after the instruction."""
        return self._instruction + prompt

    @property
    def negative_tokenizer(self) -> TemplateTokenizer:
        """Negative prompts come without an instruction."""
        return TemplateTokenizer(self.pipeline.tokenizer, self.text_length)

    def prepared(self, condition: Condition) -> Condition:
        """The condition with its texts as Gemma reads them."""
        clean = self.pipeline_default("clean_caption")
        texts = [condition.prompt, condition.negative]
        prompt, negative = self.pipeline._text_preprocessing(texts, clean_caption=clean)
        return replace(condition, prompt=prompt, negative=negative)

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> Text:
        """The encoded prompts and their mask."""
        instruction = None if null else self.pipeline_default("complex_human_instruction")
        with torch.no_grad():
            states, mask, _, _ = self.pipeline.encode_prompt(
                prompts,
                False,
                device=self.device,
                max_sequence_length=self.text_length,
                complex_human_instruction=instruction,
            )
        states = states.to(self.model.dtype)
        return Text({"encoder_hidden_states": states, "encoder_attention_mask": mask})

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The model's output (B, C, h, w), in float32 or better."""
        timestep = timestep.to(z.device).expand(len(z)) * self.model.config.timestep_scale
        return super().__call__(z.to(self.model.dtype), timestep, text).to(z.dtype)

    def latents(self, pixels: Tensor) -> Tensor:
        """Clean latents x0 of images (B, 3, H, W) in [-1, 1], in float32 and with gradient."""
        vae = self._wide_vae
        found = vae.encode(pixels.to(vae.dtype), return_dict=False)[0]
        return found * vae.config.scaling_factor
