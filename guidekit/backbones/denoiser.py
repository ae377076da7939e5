"""A diffusers pipeline as one call: `Denoiser(pipeline)`; each kind has a file beside this one."""

# Importing a kind is what makes `Denoiser` know it.
from guidekit.backbones import (  # noqa: F401
    dit,
    flux,
    lumina2,
    maps,
    pixart,
    pixel,
    qwen,
    sana,
    sd3,
    unet,
    uvit,
)
from guidekit.backbones.base import Denoiser, Text, frozen

__all__ = ["Denoiser", "Text", "frozen"]
