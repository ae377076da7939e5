"""Precision and recall of features: which images lie among real ones, and which real ones are met.

Kynkaanniemi et al. 2019 (arXiv:1904.06991).
"""

import torch
from torch import Tensor


def precision_recall(made: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Shares of features (n, d) and (m, d) that lie within the other's k-th neighbours."""
    both = covered(made, real, neighbours), covered(real, made, neighbours)
    return float(both[0].float().mean()), float(both[1].float().mean())


def covered(points: Tensor, balls: Tensor, neighbours: int = 3) -> Tensor:
    """Which points (n,) lie in a ball, each as wide as its k-th neighbour is far."""
    radii = torch.cdist(balls, balls).kthvalue(neighbours + 1).values  # the first is itself
    return (torch.cdist(points, balls) <= radii).any(1)
