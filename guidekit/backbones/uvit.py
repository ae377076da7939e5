"""Semantica: a pixel model that follows a reference image."""

from functools import cached_property

import torch

from guidekit.backbones.base import Text
from guidekit.backbones.pixel import PixelDenoiser
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.references import Reference


class Semantica(PixelDenoiser, families=("uvit",)):
    """SemanticaPipeline: `Condition.image`; a null is no image. cfg is 1 + the paper's w."""

    reads_image = True

    @property
    def models(self) -> list:
        """The networks of a run; the encoder asks for no gradients either."""
        return [self.model, self.pipeline.encoder]

    @property
    def multiple(self) -> int:
        """Whole patches, halved as often as there are stages below the first."""
        config = self.model.config
        return config.patch_size * 2 ** (len(config.block_out_channels) - 1)

    @property
    def text_length(self) -> int:
        """Number of the encoder's tokens that pixels attend to."""
        return self._shape[0]

    def check(self, conditions: list[Condition]) -> None:
        """Raises GuidekitError for a condition without an image, and for texts beside it."""
        super().check(conditions)
        if any(c.image is None for c in conditions):
            raise GuidekitError(
                f"{type(self.pipeline).__name__} follows an image: give --image ref.png, or "
                "Condition(image=Reference(...))"
            )
        self.check_no_text(conditions, "follows an image")

    def content(self, condition: Condition) -> Reference:
        """The reference image."""
        return condition.image

    @cached_property
    def _shape(self) -> tuple[int, int]:
        """Number and channels of what the encoder says of an image."""
        tokens, channels, pooled = self.pipeline.encoder.shapes()
        film = self.model.config.conditioning == "film"
        return (1, pooled) if film else (tokens, channels)

    def text(self, prompts: list, size: tuple[int, int], null: bool = False) -> Text:
        """The encoder's tokens of the references, or zeros for each."""
        if null:
            zeros = torch.zeros(len(prompts), *self._shape, device=self.device, dtype=self.dtype)
            return Text({"encoder_hidden_states": zeros})
        unique, side = list(dict.fromkeys(prompts)), self.pipeline.encoder.config.image_size
        states = self.pipeline.states(torch.stack([r.pixels(side) for r in unique]))
        rows = [unique.index(reference) for reference in prompts]
        return Text({"encoder_hidden_states": states[rows]})
