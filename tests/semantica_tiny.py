"""Tiny random Semantica: an encoder of 8x8 patches, a UViT of 16x16 pictures, their pipeline."""

import torch

from guidekit.miniatures import frozen_model, randomised
from guidekit.semantica.encode import ImageEncoder, from_timm
from guidekit.semantica.model import UViT
from guidekit.semantica.pipeline import SemanticaPipeline
from guidekit.semantica.schedule import SemanticaScheduler

SIZE = 16
UVIT = dict(
    sample_size=SIZE, patch_size=1, block_out_channels=(8, 16), layers_per_block=(1, 1),
    down_block_types=("conv",), attention_head_dim=8, cross_attention_dim=16, embedding_dim=16,
    norm_num_groups=4,
)  # fmt: skip


def encoder() -> ImageEncoder:
    """A vision transformer of one block: 4 patches and a class token of 16 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return from_timm(
            "vit_tiny_patch16_224", pretrained=False, img_size=SIZE, patch_size=8, embed_dim=16,
            depth=1, num_heads=2,
        )  # fmt: skip


def pipeline(**changes) -> SemanticaPipeline:
    """A whole pipeline; `changes` of the UViT's config."""
    unet = frozen_model(randomised(UViT(**UVIT | changes)))
    pipe = SemanticaPipeline(unet, SemanticaScheduler(image_size=SIZE), encoder())
    pipe.set_progress_bar_config(disable=True)
    return pipe
