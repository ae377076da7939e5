"""A diffusers pipeline as one call: `Denoiser(pipeline)`. See guidekit/families for the kinds."""

# Importing a kind is what makes `Denoiser` know it.
import guidekit.families.dit
import guidekit.families.flux
import guidekit.families.lumina2
import guidekit.families.pixart
import guidekit.families.pixel
import guidekit.families.qwen
import guidekit.families.sana
import guidekit.families.sd3
import guidekit.families.semantica
import guidekit.families.unet  # noqa: F401
from guidekit.families.base import Denoiser, Text, frozen

__all__ = ["Denoiser", "Text", "frozen"]
