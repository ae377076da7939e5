"""The judges of the built-in worlds: what they see in images. They never guide."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guidekit.evaluate.frechet import frechet
from guidekit.evaluate.intervals import interval
from guidekit.evaluate.kernel_distance import kernel_distance
from guidekit.evaluate.overlap import FOUND, asked_pixels, mean_iou, overlaps, presence, shown
from guidekit.train.judge import Judge
from guidekit.zoo.shipped import ZOO

# What is measured of what it sees, for scripts that import this module alone.
__all__ = [
    "FOUND",
    "Verdict",
    "asked_pixels",
    "frechet",
    "interval",
    "kernel_distance",
    "load_judge",
    "mean_iou",
    "overlaps",
    "presence",
    "see",
    "shown",
]


@dataclass(frozen=True)
class Verdict:
    """What a judge sees in n images: classes (n, H, W), 0 for none, and features (n, 64)."""

    classes: np.ndarray
    features: np.ndarray


def load_judge(name: str = "scenes-judge") -> Judge:
    """A built-in judge: that of the scenes world, or another by its name."""
    judge = Judge.from_pretrained(ZOO / name, dtype=torch.float32)
    return judge.eval().requires_grad_(False)


def see(judge: Judge, images: Tensor, batch: int = 64) -> Verdict:
    """The judge's verdict on images (n, 3, H, W) in [0, 1]."""
    classes, features = [], []
    with torch.no_grad():
        for part in images.split(batch):
            logits, pooled = judge(part.float() * 2 - 1)
            classes.append(logits.argmax(1))
            features.append(pooled)
    return Verdict(torch.cat(classes).numpy(), torch.cat(features).double().numpy())
