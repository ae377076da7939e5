"""What denoisers that read a prompt have in common."""

import inspect

import torch

from guidekit.backbones.autoencoder import LatentDenoiser
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError


class TextDenoiser(LatentDenoiser):
    """A latent denoiser whose pipeline encodes prompts."""

    cfg = 7.5
    reads_text = True

    @property
    def dtype(self) -> torch.dtype:
        """Type of the latents, as the pipeline has it: that of the text states."""
        return self.pipeline.text_encoder.dtype

    @property
    def tokenizers(self) -> list:
        """One tokenizer per text encoder that has columns among the keys, over all columns."""
        return self.key_tokenizers(self.text_length)

    @property
    def text_length(self) -> int:
        """Number of text tokens that pixels attend to: the pipeline's own choice."""
        return self.pipeline_default("max_sequence_length")

    def key_tokenizers(self, length: int) -> list:
        """`tokenizers` for a call with `length` text tokens."""
        raise NotImplementedError

    @property
    def negative_tokenizer(self):
        """That of negative prompts, which some pipelines give another form than prompts."""
        return self.tokenizers[0]

    def pipeline_default(self, name: str):
        """The default of an argument of the pipeline's call."""
        return inspect.signature(type(self.pipeline).__call__).parameters[name].default

    def check(self, conditions: list[Condition]) -> None:
        """Refuses what the text encoders would silently cut off, and labels."""
        super().check(conditions)
        for tokenizer, texts in (
            (self.tokenizers[0], {c.prompt for c in conditions}),
            (self.negative_tokenizer, {c.negative for c in conditions}),
        ):
            for text in texts:
                count = len(tokenizer(text)["input_ids"])
                if count > tokenizer.model_max_length:
                    raise GuidekitError(
                        f"the prompt has {count} tokens, the text encoder reads "
                        f"{tokenizer.model_max_length}; shorten {text!r}"
                    )
