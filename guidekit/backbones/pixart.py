"""PixArt: a transformer that cross-attends to T5 under a mask, with learned variance."""

from dataclasses import replace

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from guidekit.backbones.base import Text
from guidekit.backbones.text import TextDenoiser
from guidekit.backbones.tokenizers import KeyTokenizer
from guidekit.conditions import Condition


class PixArt(TextDenoiser, families=("pixart",)):
    """PixArt-alpha and PixArt-sigma, at the size that is asked for (use_resolution_binning=False).

    Prompts are in small letters, and cleaned where bs4 and ftfy are installed, as in diffusers.
    """

    cfg = 4.5

    def key_tokenizers(self, length: int) -> list:
        """The tokenizer of T5."""
        return [KeyTokenizer([(self.pipeline.tokenizer, length)])]

    def prepared(self, condition: Condition) -> Condition:
        """The condition with its texts as T5 reads them."""
        texts = [condition.prompt, condition.negative]
        clean = is_bs4_available() and is_ftfy_available()  # else the pipeline warns and does not
        prompt, negative = self.pipeline._text_preprocessing(texts, clean_caption=clean)
        return replace(condition, prompt=prompt, negative=negative)

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> Text:
        """The encoded prompts, their mask, and the size for models that read it."""
        with torch.no_grad():
            states, mask, _, _ = self.pipeline.encode_prompt(
                prompts, False, device=self.device, max_sequence_length=self.text_length
            )
        added = {"resolution": None, "aspect_ratio": None}
        if self.model.config.sample_size == 128:
            # The pipeline passes them on at this size, and only some of its models read them.
            count, kind = len(prompts), {"dtype": states.dtype, "device": self.device}
            added = {
                "resolution": torch.tensor([size], **kind).repeat(count, 1),
                "aspect_ratio": torch.tensor([[size[0] / size[1]]], **kind).repeat(count, 1),
            }
        return Text(
            {
                "encoder_hidden_states": states,
                "encoder_attention_mask": mask,
                "added_cond_kwargs": added,
            }
        )

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The model's output (B, 2C, h, w), or (B, C, h, w) if it learned no variance."""
        return super().__call__(z, timestep.to(z.device).expand(len(z)), text)
