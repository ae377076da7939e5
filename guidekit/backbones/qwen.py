"""Qwen-Image: packed latents, joint attention with Qwen 2.5 VL, a video autoencoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.backbones.autoencoder import statistics
from guidekit.backbones.base import Text
from guidekit.backbones.packed import PackedLatents, rescaled, set_flow_timesteps
from guidekit.backbones.text import TextDenoiser
from guidekit.backbones.tokenizers import TemplateTokenizer
from guidekit.backbones.tokenizing import tokenized


class PaddedText(Text):
    """Encoded prompts with a mask of the padding, None where there is none."""

    @staticmethod
    def cat(texts: list[Text]) -> "PaddedText":
        """The texts along the batch, padded to the longest, whose padding pixels do not see."""
        if len(texts) == 1:
            return texts[0]
        most = max(text.states.shape[1] for text in texts)
        states = [F.pad(t.states, (0, 0, 0, most - t.states.shape[1])) for t in texts]
        masks = [F.pad(t.mask, (0, most - t.mask.shape[1])) for t in texts]
        return PaddedText.of(torch.cat(states), torch.cat(masks))

    @staticmethod
    def of(states: Tensor, mask: Tensor | None) -> "PaddedText":
        """Text states (B, T, D), mask (B, T) or None."""
        mask = None if mask is None or mask.all() else mask
        return PaddedText({"encoder_hidden_states": states, "encoder_hidden_states_mask": mask})

    @property
    def mask(self) -> Tensor:
        """1 for tokens, 0 for padding (B, T)."""
        mask = self.given["encoder_hidden_states_mask"]
        return (
            self.states.new_ones(self.states.shape[:2], dtype=torch.long) if mask is None else mask
        )


class QwenImage(PackedLatents, TextDenoiser, families=("qwen",)):
    """QwenImagePipeline: prompts in its chat template, whose first tokens the pipeline drops."""

    cfg = 4.0

    def key_tokenizers(self, length: int) -> list:
        """Qwen's tokenizer, the prompt in the template, without the tokens that are dropped."""
        before, _, after = self.pipeline.prompt_template_encode.partition("{}")
        start = self.pipeline.prompt_template_encode_start_idx
        return [TemplateTokenizer(self.pipeline.tokenizer, length, before, after, start=start)]

    def read_text(self, prompt: str, tokenizer) -> str:
        """The prompt in the chat template."""
        return self.pipeline.prompt_template_encode.format(prompt)

    def text_lengths(self, prompts: list[str]) -> list[int]:
        """Number of tokens of the longest prompt, to which the pipeline pads the others."""
        (tokenizer,) = self.tokenizers
        longest = max(len(tokenized(tokenizer, prompt)["input_ids"]) for prompt in prompts)
        return [longest] * len(prompts)

    def set_timesteps(
        self, scheduler, steps: int, shape: tuple[int, int, int], **own: list[float]
    ) -> None:
        """Lays out the steps from 1 to 1 / steps, shifted by the size of the image."""
        tokens = (shape[1] // 2) * (shape[2] // 2)
        set_flow_timesteps(
            scheduler, steps, self.device, tokens, keeps=False, who="Qwen-Image", **own
        )

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> PaddedText:
        """The encoded prompts, padded to the longest of them."""
        with torch.no_grad():
            states, mask = self.pipeline.encode_prompt(
                prompts, device=self.device, max_sequence_length=self.text_length
            )
        return PaddedText.of(states, mask)

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The model's velocity (B, C, h, w)."""
        h, w = z.shape[2] // 2, z.shape[3] // 2
        out = self.network(
            self.pack(z),
            timestep=timestep.expand(len(z)).to(z.dtype) / 1000,
            img_shapes=[[(1, h, w)]] * len(z),
            return_dict=False,
            **text.kwargs(),
        )[0]
        return self.unpack(out, tuple(z.shape[2:]))

    def rescaled(self, combined: Tensor, cond: Tensor) -> Tensor:
        """The combination with the norms that `cond` has in each patch."""
        found = rescaled(self.pack(combined), self.pack(cond))
        return self.unpack(found, tuple(cond.shape[2:]))

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of finished latents, exactly as the pipeline does it."""
        with torch.no_grad():
            frames = self.vae.decode(self._unscale(z.to(self.vae.dtype)), return_dict=False)[0]
        return self._finish(frames[:, :, 0])

    def pixels(self, x0: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of clean latents x0, in float32 and with gradient."""
        vae = self._wide_vae
        return vae.decode(self._unscale(x0.to(vae.dtype)), return_dict=False)[0][:, :, 0]

    def latents(self, pixels: Tensor) -> Tensor:
        """Clean latents x0 of images (B, 3, H, W) in [-1, 1], in float32 and with gradient."""
        vae = self._wide_vae
        x0 = vae.encode(pixels.to(vae.dtype)[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, std = statistics(x0, self.vae.config)
        return (x0 - mean) / std

    def _unscale(self, z: Tensor) -> Tensor:
        """One frame (B, C, 1, h, w) for the autoencoder."""
        mean, std = statistics(z, self.vae.config)
        # Divided as in the pipeline, by the inverse.
        return (z / (1.0 / std) + mean)[:, :, None]
