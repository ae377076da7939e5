"""A diffusers pipeline as one call: `Denoiser(pipeline)`. See guidekit/families for the kinds."""

# Importing a kind is what makes `Denoiser` know it.
import guidekit.backbones.dit
import guidekit.backbones.flux
import guidekit.backbones.lumina2
import guidekit.backbones.pixart
import guidekit.backbones.pixel
import guidekit.backbones.qwen
import guidekit.backbones.sana
import guidekit.backbones.sd3
import guidekit.backbones.unet  # noqa: F401
from guidekit.backbones.base import Denoiser, Text, frozen

__all__ = ["Denoiser", "Text", "frozen"]
