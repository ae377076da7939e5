"""Lumina2: pixels packed after each prompt's own tokens, and time that runs from noise to 1."""

import torch
from torch import Tensor

from guidekit.backbones.base import Text
from guidekit.backbones.packed import rescaled, set_flow_timesteps
from guidekit.backbones.text import TextDenoiser
from guidekit.backbones.tokenizers import TemplateTokenizer
from guidekit.backbones.tokenizing import tokenized


class Lumina2(TextDenoiser, families=("lumina2",)):
    """Lumina2Pipeline: prompts after its system prompt, negative ones without.

    The model's output is the velocity from noise to image; here it has diffusers' sign.
    """

    cfg = 4.0

    @property
    def multiple(self) -> int:
        """Whole patches."""
        return self.factor * 2

    def key_tokenizers(self, length: int) -> list:
        """Gemma's tokenizer, the system prompt before the prompt."""
        before = f"{self.pipeline.system_prompt} <Prompt Start> "
        return [TemplateTokenizer(self.pipeline.tokenizer, length, before)]

    def read_text(self, prompt: str, tokenizer) -> str:
        """The prompt after the system prompt."""
        return f"{self.pipeline.system_prompt} <Prompt Start> {prompt}"

    @property
    def negative_tokenizer(self) -> TemplateTokenizer:
        """Negative prompts come without the system prompt."""
        return TemplateTokenizer(self.pipeline.tokenizer, self.text_length)

    def text_lengths(self, prompts: list[str]) -> list[int]:
        """Number of tokens of each prompt with the system prompt; the padding is left out."""
        (tokenizer,) = self.tokenizers
        return [len(tokenized(tokenizer, prompt)["input_ids"]) for prompt in prompts]

    def set_timesteps(
        self, scheduler, steps: int, shape: tuple[int, int, int], **own: list[float]
    ) -> None:
        """Lays out the steps; the pipeline shifts them by the number of channels of the latents."""
        set_flow_timesteps(
            scheduler, steps, self.device, shape[0], keeps=False, who="Lumina2", **own
        )

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> Text:
        """The encoded prompts and their mask."""
        given = {"device": self.device, "max_sequence_length": self.text_length}
        with torch.no_grad():
            if null:  # `encode_prompt` alone would put the system prompt before them
                states, mask = self.pipeline._get_gemma_prompt_embeds(prompts, **given)
            else:
                states, mask, _, _ = self.pipeline.encode_prompt(prompts, False, **given)
        return Text({"encoder_hidden_states": states, "encoder_attention_mask": mask})

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The velocity (B, C, h, w) from image to noise."""
        time = 1 - timestep / self.pipeline.scheduler.config.num_train_timesteps
        return -super().__call__(z, time.to(z.device).expand(len(z)), text)

    def rescaled(self, combined: Tensor, cond: Tensor) -> Tensor:
        """The combination with the norms of `cond` along the rows of the latents, as upstream."""
        return rescaled(combined, cond)
