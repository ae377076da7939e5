"""Tiny open_clip models of 32x32 images with random weights: ResNet, ViT, a ConvNeXt of timm."""

from guidekit.noisy_clip.files import Clip
from guidekit.noisy_clip.miniature import random_clip, random_noisy
from guidekit.noisy_clip.model import NoisyClip

VISION = {
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 64},
    "vit": {
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "image_size": 32,
        "output_tokens": True,
    },
    "timm": {"timm_model_name": "test_convnext", "image_size": 32, "timm_pool": ""},
}


def clip(kind: str = "vit") -> Clip:
    """The same weights at every call."""
    return random_clip(VISION[kind], 32)


def noisy(kind: str = "vit", channels: int = 0, factor: int = 1) -> NoisyClip:
    """A noise-aware one whose norms follow the level."""
    return random_noisy(clip(kind), channels, factor)
