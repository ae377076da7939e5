"""Semantica: a pixel model that follows a reference picture."""

import torch
from torch import Tensor

from guidekit.conditions import Condition, Reference
from guidekit.families.base import Text
from guidekit.families.pixel import PixelDenoiser


class Semantica(PixelDenoiser, families=("uvit",)):
    """SemanticaPipeline: `Condition.image`; a null is no picture. cfg is 1 + the paper's w."""

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
        return self.pipeline.encoder.shapes()[0]

    def check(self, conditions: list[Condition]) -> None:
        """Raises ValueError for a condition without a picture, and for texts beside it."""
        super().check(conditions)
        if any(c.image is None for c in conditions):
            raise ValueError(
                f"{type(self.pipeline).__name__} follows a picture: give --image ref.png, or "
                "Condition(image=Reference(...))"
            )
        self.check_no_text(conditions, "it draws what a picture shows")

    def content(self, condition: Condition) -> Reference:
        """The reference picture."""
        return condition.image

    def text(
        self, prompts: list[Reference], size: tuple[int, int], null: bool = False
    ) -> Text:
        """The encoder's tokens of the references, or zeros for each."""
        unique = list(dict.fromkeys(prompts))
        size = self.pipeline.encoder.config.image_size
        states = self.pipeline.states(torch.stack([r.pixels(size) for r in unique]))
        states = states[[unique.index(r) for r in prompts]]
        return Text({"encoder_hidden_states": torch.zeros_like(states) if null else states})

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The velocity (B, 3, H, W)."""
        return super().__call__(z, timestep, text)
