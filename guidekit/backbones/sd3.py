"""Stable Diffusion 3: joint attention of pixels with two CLIPs and T5, flow matching."""

import torch
from torch import Tensor

from guidekit.backbones.base import Text
from guidekit.backbones.packed import dynamic_shift
from guidekit.backbones.text import TextDenoiser
from guidekit.backbones.tokenizers import KeyTokenizer


class StableDiffusion3(TextDenoiser, families=("sd3",)):
    """Stable Diffusion 3 and 3.5."""

    cfg = 7.0
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @property
    def multiple(self) -> int:
        """Whole patches."""
        return self.factor * self.model.config.patch_size

    @property
    def text_length(self) -> int:
        """The columns of CLIP, whose two encoders are joined in channels, then those of T5."""
        return self.pipeline.tokenizer_max_length + super().text_length

    def key_tokenizers(self, length: int) -> list:
        """Each CLIP's tokenizer with T5's after it."""
        clip, pipe = self.pipeline.tokenizer_max_length, self.pipeline
        # Without its encoder T5's columns are zeros: no phrase is read there.
        last = (None if pipe.text_encoder_3 is None else pipe.tokenizer_3, length - clip)
        return [KeyTokenizer([(t, clip), last]) for t in (pipe.tokenizer, pipe.tokenizer_2)]

    def set_timesteps(
        self, scheduler, steps: int, shape: tuple[int, int, int], **own: list[float]
    ) -> None:
        """Lays out the steps; their shift depends on the size where the scheduler says so."""
        patch = self.model.config.patch_size
        tokens = (shape[1] // patch) * (shape[2] // patch)
        given = dynamic_shift(scheduler, tokens, max_shift=1.16)
        count = own or {"num_inference_steps": steps}
        scheduler.set_timesteps(**count, device=self.device, **given)

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> Text:
        """The encoded prompts and their pooled states."""
        with torch.no_grad():
            states, _, pooled, _ = self.pipeline.encode_prompt(
                prompts,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=TextDenoiser.text_length.fget(self),
            )
        return Text({"encoder_hidden_states": states, "pooled_projections": pooled})

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The model's velocity (B, C, h, w)."""
        return super().__call__(z, timestep.expand(len(z)), text)
