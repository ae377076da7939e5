"""Diversity: how far images of one condition lie apart, by an extractor's features."""

import itertools

import numpy as np


def spread(features: np.ndarray) -> float:
    """Mean distance between the pairs of one condition's features (n, d), of two images or more."""
    pairs = itertools.combinations(features, 2)
    return float(np.mean([np.linalg.norm(a - b) for a, b in pairs]))
