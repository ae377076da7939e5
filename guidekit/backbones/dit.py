"""DiT: a transformer conditioned on a class, with learned variance."""

from dataclasses import replace

import torch
from torch import Tensor

from guidekit.backbones.autoencoder import LatentDenoiser
from guidekit.backbones.base import Text
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError


class DiT(LatentDenoiser, families=("dit",)):
    """DiTPipeline: `Condition.label`, or the class's name as the prompt; square images."""

    cfg = 4.0

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """Whole patches."""
        return self.factor * self.model.config.patch_size

    @property
    def classes(self) -> int:
        """Number of classes; the one after the last is the null."""
        return self.model.config.num_embeds_ada_norm

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, h, w) of the latents; ValueError for images that are not square."""
        shape = super().latent_shape(height, width)
        if shape[1] != shape[2]:
            raise GuidekitError(f"DiT draws square images, not {height}x{width}")
        return shape

    def prepared(self, condition: Condition) -> Condition:
        """The condition with the label of the class that its prompt names."""
        if condition.label is not None or not condition.prompt:
            return condition
        known = self.pipeline.labels
        if condition.prompt not in known:
            named = f"the names of its classes, such as {next(iter(known))!r}" if known else "none"
            raise GuidekitError(
                f"{type(self.pipeline).__name__} reads no text but {named}; give label, from 0 to "
                f"{self.classes - 1}"
            )
        return replace(condition, label=known[condition.prompt], prompt="")

    def check(self, conditions: list[Condition]) -> None:
        """Raises GuidekitError for a condition that is no class, and for texts beside it."""
        for condition in conditions:
            if condition.label is None or not 0 <= condition.label < self.classes:
                raise GuidekitError(
                    f"{type(self.pipeline).__name__} draws classes: give label, from 0 to "
                    f"{self.classes - 1}, not {condition.label}"
                )
            if condition.prompt or condition.negative or condition.segments:
                raise GuidekitError(
                    f"{type(self.pipeline).__name__} reads no text; leave prompt, negative and "
                    "segments out"
                )

    def text(self, prompts: list[int], size: tuple[int, int], null: bool = False) -> Text:
        """The classes, or the null class for each."""
        labels = [self.classes] * len(prompts) if null else prompts
        return Text({"class_labels": torch.tensor(labels, device=self.device)})

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The model's output (B, 2C, h, w), or (B, C, h, w) if it learned no variance."""
        return super().__call__(z, timestep.to(z.device).expand(len(z)), text)

    def _unscale(self, z: Tensor) -> Tensor:
        return 1 / self.vae.config.scaling_factor * z

    def _finish(self, pixels: Tensor) -> Tensor:
        return (pixels / 2 + 0.5).clamp(0, 1)
