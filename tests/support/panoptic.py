"""COCO's panoptic form in small, and a random Mask2Former and MaskFormer of its classes."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

NAMES = ("person", "grass", "sky-other-merged")


def write_panoptic(folder: Path, n: int = 10, size: int = 32) -> Path:
    """Images and maps of n scenes, each sky over grass with a person; returns the JSON file."""
    (folder / "images").mkdir(parents=True)
    (folder / "val").mkdir()
    rows, draws = [], np.random.default_rng(0)
    for i in range(n):
        numbers = np.full((size, size), 256 * 7 + 3)
        numbers[size // 2 :] = 70_000
        left = 2 + i % 8
        numbers[8:20, left : left + 6] = 5
        colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1)
        Image.fromarray(colours.astype(np.uint8)).save(folder / "val" / f"{i:012d}.png")
        Image.fromarray(draws.integers(0, 255, (size, size, 3), np.uint8)).save(
            folder / "images" / f"{i:012d}.jpg"
        )
        segments = [(256 * 7 + 3, 187), (70_000, 125), (5, 1)]
        info = [{"id": number, "category_id": category} for number, category in segments]
        rows.append({"file_name": f"{i:012d}.png", "segments_info": info})
    categories = [{"id": k, "name": v} for k, v in zip((1, 125, 187), NAMES, strict=True)]
    path = folder / "val.json"
    path.write_text(json.dumps({"categories": categories, "annotations": rows}))
    return path


def write_mask2former(folder: Path) -> Path:
    """A Mask2Former of random weights, as transformers saves it."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
    )

    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=_backbone(),
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        **_classes(),
    )
    Mask2FormerForUniversalSegmentation(config).eval().save_pretrained(folder)
    size = {"height": 64, "width": 64}  # a feature of a single pixel cannot be normalised
    Mask2FormerImageProcessor(size=size).save_pretrained(folder)
    return folder


def write_maskformer(folder: Path) -> Path:
    """A MaskFormer of random weights, as transformers saves it."""
    from transformers import (
        DetrConfig,
        MaskFormerConfig,
        MaskFormerForInstanceSegmentation,
        MaskFormerImageProcessor,
    )

    torch.manual_seed(0)
    decoder = DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
    )
    config = MaskFormerConfig(
        backbone_config=_backbone(),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        **_classes(),
    )
    MaskFormerForInstanceSegmentation(config).eval().save_pretrained(folder)
    MaskFormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def _backbone():
    from transformers import SwinConfig

    return SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2,
        out_features=[f"stage{i}" for i in (1, 2, 3, 4)],
    )  # fmt: skip


def _classes() -> dict:
    names = [*reversed(NAMES), "dog"]
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
