"""Part `layouts` of benchmarks/family.py: attention methods on the built-in text-to-image model.

The layouts are those of benchmarks/layout.py, held-out scenes with a mask for each object. The
judge `scenes-judge` says what stands where: mIoU over the whole image and over labelled pixels,
presence, and the Frechet distance of its features to real scenes. `diversity` is the mean distance
of these features between two images of one layout, over the first layouts. Methods have the
model's tuned options where there are some, else their own defaults.
"""

import time

import numpy as np
import torch

from family_inverse import cost
from guidekit.evaluate import judge as evaluate
from guidekit.evaluate.diversity import spread
from guidekit.evaluate.intervals import interval
from layout import Bench, Setting
from memory import PeakMemory

MODEL, CFG = "scenes", 4.0
DIVERSE = 20  # layouts that are drawn twice

METHODS = (
    "unguided",
    "zest",
    "attend-and-excite",
    "boxdiff",
    "layout-guidance",
    "self-guidance",
    "pww",
    "regions",
    "multidiffusion",
)


def row_keys() -> list[dict[str, str]]:
    """What names each row."""
    return [{"model": MODEL, "task": "layout", "method": method} for method in METHODS]


def row(key: dict[str, str], n: int, steps: int, batch: int, seed: int) -> dict:
    """One row."""
    bench = Bench(Setting(MODEL, n, steps, CFG, batch, seed))
    conditions, method = bench.layouts.conditions, key["method"]
    if method == "multidiffusion":
        conditions = bench.layouts.on_grounds()

    def guidances() -> list:
        return [] if method == "unguided" else [bench.made(method, {})]

    started = time.process_time()
    with PeakMemory() as peak:
        images = bench.images(guidances, conditions, range(seed, seed + n))
    costs = cost(started, n, peak, batch)
    twice = bench.images(guidances, conditions[:DIVERSE], range(seed + n, seed + 2 * n))
    return key | bench.judged(method, images) | _diversity(bench, images, twice) | costs


def _diversity(bench: Bench, images: torch.Tensor, twice: torch.Tensor) -> dict:
    """Mean distance of features between the images of a layout, and its interval."""
    pairs = [evaluate.see(bench.judge, part).features for part in (images[: len(twice)], twice)]
    apart = np.array([spread(np.stack(pair)) for pair in zip(*pairs, strict=True)])
    bounds = interval(lambda i: float(apart[i].mean()), len(apart))
    return {"diversity": float(apart.mean()), "diversity 95%": bounds}
