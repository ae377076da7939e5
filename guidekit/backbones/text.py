"""What denoisers that read a prompt have in common."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import ClassVar

import torch

from guidekit.backbones.autoencoder import LatentDenoiser
from guidekit.backbones.received import check_received, received
from guidekit.backbones.tokenizing import tokenized
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError


class TextDenoiser(LatentDenoiser):
    """A latent denoiser whose pipeline encodes prompts."""

    cfg = 7.5
    reads_text = True
    #: Names of the pipeline's text encoders whose tokens are keys of the pixels.
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)

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

    def read_text(self, prompt: str, tokenizer) -> str:
        """The prompt as the pipeline hands it to one of its tokenizers."""
        convert = getattr(self.pipeline, "maybe_convert_prompt", None)
        return prompt if convert is None else convert(prompt, tokenizer)

    @contextlib.contextmanager
    def asserted(self, prompts: list[str]) -> Iterator[None]:
        """Compares what the text encoders get inside with the tokens of `prompts`.

        An encoder that is not called, or whose calls cannot be seen, is not compared. Raises
        GuidekitError that shows both where they differ.
        """
        parts = {name: getattr(self.pipeline, name, None) for name in self.encoders}
        with received(parts if prompts else {}) as rows:
            yield
        for name, found in rows.items():
            tokenizer = getattr(self.pipeline, name.replace("text_encoder", "tokenizer"))
            for prompt in prompts:
                ids = tokenized(tokenizer, self.read_text(prompt, tokenizer))["input_ids"]
                check_received(ids, found, tokenizer, f"{name} of {type(self.pipeline).__name__}")

    def check_own_loop(self) -> None:
        """Raises GuidekitError for pipelines that read an image, which this loop has not."""
        name, remedy = type(self.pipeline).__name__, "call the pipeline inside guidekit.attach"
        reads = inspect.signature(type(self.pipeline).__call__).parameters
        latents = getattr(self.vae.config, "latent_channels", self.channels)
        if found := [p for p in ("image", "control_image", "mask_image") if p in reads]:
            raise GuidekitError(
                f"{name} draws from an image ({found[0]}), which guidekit.sample does not give it: "
                f"{remedy}, or put its parts into the pipeline that draws from a prompt alone, to "
                "which guidekit.sample gives image and strength"
            )
        if self.channels != latents:
            raise GuidekitError(
                f"the model of {name} reads {self.channels} channels, the latents have {latents}: "
                "the others are of a control, which --control or Sampling(controls=...) gives it, "
                f"or of an image (inpainting, editing): {remedy}"
            )
        if getattr(self.model, "encoder_hid_proj", None) is not None:
            raise GuidekitError(
                f"an IP-Adapter is loaded, and guidekit.sample gives it no image: {remedy}, or "
                "take it off (unload_ip_adapter())"
            )

    def check(self, conditions: list[Condition]) -> None:
        """Refuses what the text encoders would silently cut off, and labels."""
        super().check(conditions)
        for tokenizer, texts in (
            (self.tokenizers[0], {c.prompt for c in conditions}),
            (self.negative_tokenizer, {c.negative for c in conditions}),
        ):
            for text in texts:
                count = len(tokenized(tokenizer, text)["input_ids"])
                if count > tokenizer.model_max_length:
                    raise GuidekitError(
                        f"the prompt has {count} tokens, the text encoder reads "
                        f"{tokenizer.model_max_length}; shorten {text!r}"
                    )
