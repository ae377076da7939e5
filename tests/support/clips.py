"""Tiny open_clip models of 32x32 images with random weights: ResNet, ViT, a ConvNeXt of timm."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from guidekit.noisy_clip.files import Clip
from guidekit.noisy_clip.miniature import random_clip, random_noisy
from guidekit.noisy_clip.model import NoisyClip
from guidekit.zoo.shipped import ZOO

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


def other_clip(parent: Path) -> Path:
    """A folder with the built-in CLIP, one of its weights changed: another judge by its hash."""
    folder = Path(shutil.copytree(ZOO / "scenes-clip", parent / "other-clip"))
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["logit_scale"] = weights["logit_scale"] + 1
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def noisy(kind: str = "vit", channels: int = 0, factor: int = 1) -> NoisyClip:
    """A noise-aware one whose norms follow the level."""
    return random_noisy(clip(kind), channels, factor)
