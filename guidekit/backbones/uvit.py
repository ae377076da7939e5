"""Semantica: a pixel model that follows a reference image."""

from functools import cached_property

import torch
from torch import Tensor

from guidekit.backbones.base import Text
from guidekit.backbones.pixel import PixelDenoiser
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.references import Reference


class References(Text):
    """What the encoder says of B references: as many tokens for each as for the longest."""

    @staticmethod
    def cat(texts: list[Text]) -> Text:
        """One after the other along the batch; an image of fewer tokens has them several times."""
        states = _level([text.states for text in texts])
        return References({"encoder_hidden_states": torch.cat(states)})


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
            return References({"encoder_hidden_states": zeros})
        unique = list(dict.fromkeys(prompts))
        states = torch.cat(_level(self._states(unique)))
        rows = [unique.index(reference) for reference in prompts]
        return References({"encoder_hidden_states": states[rows]})

    def _states(self, references: list[Reference]) -> list[Tensor]:
        """Each reference's tokens (1, V T, D): its V squares' side by side, or their mean for FiLM.

        The model was trained on one square; attention reads a set, so more tokens are no change of
        its form, and the same square V times is read as once.
        """
        side = self.pipeline.encoder.config.image_size
        squares = [reference.views(side, reference.fit) for reference in references]
        parts = self.pipeline.states(torch.cat(squares)).split([len(each) for each in squares])
        if self.model.config.conditioning == "film":
            return [part.mean(0, keepdim=True) for part in parts]
        return [part.flatten(0, 1)[None] for part in parts]


def _level(states: list[Tensor]) -> list[Tensor]:
    """States (B, T, D) repeated to the largest T, which changes nothing that attention makes."""
    most = max(each.shape[1] for each in states)
    return [each.repeat(1, most // each.shape[1], 1) for each in states]
