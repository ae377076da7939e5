"""A SegFormer small enough for tests, in the form that transformers saves."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor


def write_segformer(
    folder: Path, names: Sequence[str], logits: Sequence[float] | None = None
) -> Path:
    """A folder of a segmenter of these classes; with `logits` it gives every pixel those."""
    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
        id2label=dict(enumerate(names)),
    )
    model = SegformerForSemanticSegmentation(config)
    if logits is not None:
        last = model.decode_head.classifier
        torch.nn.init.zeros_(last.weight)
        last.bias = torch.nn.Parameter(torch.tensor(logits))
    model.save_pretrained(folder)
    SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return Path(folder)
