"""Measures of clip_guidance.py: what the judge finds, spread, retrieval, colours; tables."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from guidekit.evaluate import diversity, retrieval
from guidekit.evaluate import judge as evaluate
from guidekit.worlds import scenes

NEGATIVES = 99  # real scenes that an image is retrieved among
SAMPLES = 4  # images of one condition, one after the other
COLOURS = {
    c: [i for i, k in enumerate(scenes.CLASSES) if k.startswith(f"{c} ")] for c in scenes.COLOURS
}


def measure(values: np.ndarray) -> dict[str, object]:
    """Mean and 95% bootstrap interval of numbers of images."""
    return {
        "mean": float(values.mean()),
        "95%": evaluate.interval(lambda i: float(values[i].mean()), len(values)),
    }


def columns(**values: np.ndarray) -> dict[str, object]:
    """Columns of a row with their intervals; underscores stand for spaces."""
    row = {}
    for name, numbers in values.items():
        found, name = measure(numbers.astype(float)), name.replace("_", " ")
        row |= {name: found["mean"], f"{name} 95%": found["95%"]}
    return row


def over_conditions(**values: np.ndarray) -> dict[str, object]:
    """Columns of numbers of images, of which SAMPLES in a row share a condition."""
    return columns(
        **{name: numbers.reshape(-1, SAMPLES).mean(1) for name, numbers in values.items()}
    )


def interval(statistic: Callable, n: int, draws: int = 1000) -> tuple[float, float]:
    """95% bootstrap interval over conditions of a statistic of the indices of n images."""
    groups = np.arange(n).reshape(-1, SAMPLES)
    return evaluate.interval(lambda i: statistic(groups[i].ravel()), len(groups), draws)


def frechet(features: np.ndarray, real: np.ndarray) -> dict[str, object]:
    """Frechet distance of features (n, d) to real ones."""

    def statistic(i: np.ndarray) -> float:
        return evaluate.frechet(features[i], real)

    bounds = interval(statistic, len(features), draws=200)
    return {"Frechet": statistic(np.arange(len(features))), "Frechet 95%": bounds}


def asked_found(found: np.ndarray, kinds: list[str]) -> dict[str, np.ndarray]:
    """Of each image: is the asked colour there, and colour and shape in one object?"""
    pairs = [*zip(evaluate.shown(found), kinds, strict=True)]
    colour = [shown[COLOURS[kind.split()[0]]].any() for shown, kind in pairs]
    both = [shown[scenes.CLASSES.index(kind)] for shown, kind in pairs]
    return {"colour": np.array(colour), "colour_and_shape": np.array(both)}


def spread(features: np.ndarray) -> np.ndarray:
    """Mean distance of features (n, d) between the samples of each condition."""
    groups = features[: len(features) // SAMPLES * SAMPLES].reshape(-1, SAMPLES, features.shape[1])
    return np.array([diversity.spread(group) for group in groups])


def ranks(images: Tensor, queries: Tensor, real: Tensor, seed: int) -> np.ndarray:
    """Place of each image (n, D) among real ones by its query (n, D); 0 is the first."""
    return retrieval.ranks(images.numpy(), queries.numpy(), real.numpy(), NEGATIVES, seed)


def silhouettes(found: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of any object in class maps (n, H, W)."""
    objects = [(maps > 0).astype(int) for maps in (found, other)]
    inter, union = evaluate.overlaps(*objects, classes=1)
    return (inter / np.maximum(union, 1))[:, 0]


def statistics(images: Tensor) -> Tensor:
    """Mean and standard deviation of the colours of images in [0, 1]: (n, 6)."""
    flat = images.flatten(2)
    return torch.cat([flat.mean(2), flat.std(2)], 1)


def free_colour(image: Tensor, found: np.ndarray) -> Tensor:
    """Median colour (3,) of the pixels of an image (3, H, W) that show no object."""
    free = torch.from_numpy(found == 0)
    return (image[:, free] if free.any() else image.flatten(1)).median(1).values


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table with the intervals in brackets."""
    names = [k for k in rows[-1] if not k.endswith("95%") and k != "n"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join(lines + ["| " + " | ".join(_cell(r, n) for n in names) + " |" for r in rows])


def _cell(row: dict, name: str) -> str:
    value, bounds = row.get(name, ""), row.get(f"{name} 95%")
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if bounds is None else f"{value:.3f} [{bounds[0]:.2f}, {bounds[1]:.2f}]"
