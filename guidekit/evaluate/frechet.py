"""Frechet distance of features: FID, FD-DINOv2 and others by their extractor.

Heusel et al. 2017 (arXiv:1706.08500). Its bias falls with the number of images and depends on the
model (Chong and Forsyth 2020, arXiv:1911.07023): compare equal numbers.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Moments:
    """Sums of features, added shard by shard, so that none need be kept."""

    n: int = 0
    total: np.ndarray | float = 0.0
    outer: np.ndarray | float = 0.0

    def add(self, features: np.ndarray) -> None:
        """Adds features (n, d)."""
        features = features.astype(np.float64)
        self.n += len(features)
        self.total = self.total + features.sum(0)
        self.outer = self.outer + features.T @ features

    def merge(self, other: "Moments") -> None:
        """Adds the sums of other features."""
        self.n += other.n
        self.total = self.total + other.total
        self.outer = self.outer + other.outer

    @property
    def mean(self) -> np.ndarray:
        """Their mean (d,)."""
        return self.total / self.n

    @property
    def covariance(self) -> np.ndarray:
        """Their covariance (d, d), unbiased."""
        return (self.outer - self.n * np.outer(self.mean, self.mean)) / (self.n - 1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of Gaussians fitted to features (n, d) and (m, d)."""
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return of_gaussians(a.mean(0), covariances[0], b.mean(0), covariances[1])


def of_moments(a: Moments, b: Moments) -> float:
    """Frechet distance of features whose sums were kept."""
    return of_gaussians(a.mean, a.covariance, b.mean, b.covariance)


def of_gaussians(
    mean: np.ndarray, covariance: np.ndarray, other: np.ndarray, others: np.ndarray
) -> float:
    """Frechet distance of two Gaussians: means (d,), covariances (d, d)."""
    gap = mean - other
    # The eigenvalues of a product of covariances are real and not negative; rounding is clipped.
    eigenvalues = np.linalg.eigvals(covariance @ others).real.clip(min=0)
    spread = np.trace(covariance) + np.trace(others) - 2 * np.sqrt(eigenvalues).sum()
    return float(gap @ gap + spread)
