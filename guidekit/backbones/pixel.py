"""Pixel models, which have no autoencoder, and the unconditional ones among them."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from guidekit.backbones.base import Denoiser, Text
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError


class PixelDenoiser(Denoiser):
    """A denoiser whose latents are the pixels, in [-1, 1]."""

    def check_no_text(self, conditions: list[Condition], why: str) -> None:
        """Raises GuidekitError, with the reason, for any text: there is nothing to read it."""
        for name in ("prompt", "negative", "segments"):
            if any(getattr(c, name) for c in conditions):
                raise GuidekitError(
                    f"{type(self.pipeline).__name__} {why}, so it reads no {name}; leave it out"
                )

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], exactly as the pipeline does it."""
        with torch.no_grad():
            return (z / 2 + 0.5).clamp(0, 1)

    def pixels(self, x0: Tensor) -> Tensor:
        """x0 itself, (B, 3, H, W) in [-1, 1]."""
        return x0

    def latents(self, pixels: Tensor) -> Tensor:
        """The pixels (B, 3, H, W) in [-1, 1] themselves."""
        return pixels


class Unconditional(PixelDenoiser, families=("unet2d",)):
    """DDPMPipeline and DDIMPipeline: a UNet2DModel without text.

    Raises GuidekitError for pipelines with further parts and for models that need a class.
    """

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        parts = {k for k, v in pipeline.components.items() if v is not None}
        if others := sorted(parts - {"unet", "scheduler"}):
            raise GuidekitError(
                f"{type(pipeline).__name__} has {', '.join(others)} beside an unconditional UNet; "
                "pipelines of a UNet2DModel and a scheduler can be used"
            )
        if self.model.class_embedding is not None:
            raise GuidekitError("this UNet2DModel needs a class, which DDPMPipeline cannot give it")

    @property
    def multiple(self) -> int:
        """Height and width must be halved as often as the model has levels."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    def check(self, conditions: list[Condition]) -> None:
        """Raises GuidekitError for any text: there is nothing to read it."""
        super().check(conditions)
        self.check_no_text(conditions, "draws without a condition")

    def text(self, prompts: list[str], size: tuple[int, int], null: bool = False) -> Text:
        """Nothing; ValueError for a null, as there is no condition to leave out."""
        self.check_cfg(2.0 if null else 1.0)
        return Text()

    def check_cfg(self, cfg: float) -> None:
        """Raises GuidekitError for classifier-free guidance: there is no condition to leave out."""
        if cfg > 1:
            raise GuidekitError(
                f"{type(self.pipeline).__name__} draws without a condition, so there is no "
                "classifier-free guidance; leave cfg at 1"
            )
