"""A tiny CLIP with random weights, for tests and for the conformance suite."""

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from guidekit.noisy_clip.files import Clip, build
from guidekit.noisy_clip.model import CleanClip, NoisyClip

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 16}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
PREPROCESS = {
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
    "mode": "RGB",
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def random_clip(vision: dict = VISION, size: int = 16) -> Clip:
    """A CLIP for images of `size`, the same at every call; BatchNorms have statistics."""
    model_cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}
    config = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS | {"size": [size, size]}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config)
        for module in model.visual.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.5)
    return Clip(model, SimpleTokenizer(context_length=TEXT["context_length"]), config)


def random_encoder(channels: int, noisy: bool = True) -> CleanClip:
    """An encoder of images, or of latents with other than 3 channels."""
    clip = random_clip()
    return random_noisy(clip, 0 if channels == 3 else channels) if noisy else CleanClip(clip)


def random_noisy(clip: Clip, channels: int = 0, factor: int = 1) -> NoisyClip:
    """A noise-aware version whose norms follow the level at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = NoisyClip(clip, 16, channels, factor)
        for norm in made.norms:
            norm.gains.weight.data.normal_(std=0.2)
    return made.eval().requires_grad_(False)
