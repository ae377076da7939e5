"""Measures of guided images: mIoU of layouts, presence, Frechet and kernel distance, intervals.

The built-in judge reads the images; it never guides. Heusel et al. 2017 (arXiv:1706.08500) for
the Frechet distance, Binkowski et al. 2018 (arXiv:1801.01401) for the kernel distance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guidekit.train.judge import Judge
from guidekit.worlds import scenes
from guidekit.zoo.shipped import ZOO

# An object counts as found where at least this share of the image is given its class; the
# smallest object, a ring of 0.3 of the side, covers 0.045.
FOUND = 0.015


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in n images: classes (n, H, W), 0 for none, and features (n, 64)."""

    classes: np.ndarray
    features: np.ndarray


def load_judge() -> Judge:
    """The built-in judge of the scenes world."""
    judge = Judge.from_pretrained(ZOO / "scenes-judge", dtype=torch.float32)
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


def overlaps(
    found: np.ndarray, wanted: np.ndarray, labelled_only: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union in pixels of every image and class, each (n, 48).

    found, wanted: class maps (n, H, W). labelled_only: pixels without a wanted object do not
    count, as in ZestGuide's evaluation; there an object may spill into free space at no cost.
    """
    inside = wanted > 0 if labelled_only else np.ones_like(wanted, bool)
    inter, union = [], []
    for label in range(1, len(scenes.CLASSES) + 1):
        a, b = (found == label) & inside, wanted == label
        inter.append((a & b).sum((1, 2)))
        union.append((a | b).sum((1, 2)))
    return np.stack(inter, 1), np.stack(union, 1)


def mean_iou(inter: np.ndarray, union: np.ndarray, asked: np.ndarray) -> float:
    """Mean over the classes asked for of summed intersection over summed union.

    inter, union: (n, classes); asked: (n, classes), pixels asked of each class.
    """
    present = asked.sum(0) > 0
    return float((inter.sum(0)[present] / np.maximum(union.sum(0)[present], 1)).mean())


def asked_pixels(wanted: np.ndarray) -> np.ndarray:
    """Pixels of each class in class maps (n, H, W): (n, 48)."""
    labels = range(1, len(scenes.CLASSES) + 1)
    return np.stack([(wanted == label).sum((1, 2)) for label in labels], 1)


def presence(found: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Objects found anywhere in the image, and objects asked for, of each image: (n,) each."""
    pixels = found.shape[1] * found.shape[2]
    asked = asked_pixels(wanted) > 0
    seen = asked_pixels(found) >= FOUND * pixels
    return (seen & asked).sum(1), asked.sum(1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to features (n, d) and (m, d)."""
    difference = a.mean(0) - b.mean(0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The eigenvalues of a product of covariances are real and not negative; rounding is clipped.
    eigenvalues = np.linalg.eigvals(first @ second).real.clip(min=0)
    spread = np.trace(first) + np.trace(second) - 2 * np.sqrt(eigenvalues).sum()
    return float(difference @ difference + spread)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the cubic kernel (x y / d + 1)^3."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    aa, bb = kernel(a, a), kernel(b, b)
    n, m = len(a), len(b)
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * kernel(a, b).mean())


def interval(
    statistic: Callable[[np.ndarray], float], n: int, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% bootstrap interval of a statistic of n images, given the indices of a resample."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(n, size=n)) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
