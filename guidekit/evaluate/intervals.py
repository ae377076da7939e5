"""How sure a number is: bootstrap over layouts or prompts, not over pixels; paired differences."""

from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray], float]  # of the indices of a resample


def interval(statistic: Statistic, n: int, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of a statistic of n images, given the indices of a resample."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(n, size=n)) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def difference(
    a: Statistic, b: Statistic, n: int, draws: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """a - b of the same n layouts, and its 95% interval: both get the same resample."""
    everything = np.arange(n)
    value = a(everything) - b(everything)
    return value, interval(lambda i: a(i) - b(i), n, draws, seed)
