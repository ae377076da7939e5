"""Precision and recall of features: which images lie among real ones, and which real ones are met.

Kynkaanniemi et al. 2019 (arXiv:1904.06991).
"""

import torch
from torch import Tensor


def precision_recall(made: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Shares of features (n, d) and (m, d) that lie within the other's k-th neighbours."""
    return _covered(made, real, neighbours), _covered(real, made, neighbours)


def _covered(points: Tensor, balls: Tensor, neighbours: int) -> float:
    """Share of the points that lie in a ball, each as wide as its k-th neighbour is far."""
    radii = torch.cdist(balls, balls).kthvalue(neighbours + 1).values  # the first is itself
    return float((torch.cdist(points, balls) <= radii).any(1).float().mean())
