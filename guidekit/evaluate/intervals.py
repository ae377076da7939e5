"""How sure a number is: bootstrap over layouts or prompts, not over pixels; paired differences."""

from collections.abc import Callable, Sequence

import numpy as np

Statistic = Callable[[np.ndarray], float]  # of the indices of a resample
Cell = dict[str, np.ndarray]  # numbers of the images of one training, all of one length


def interval(statistic: Statistic, n: int, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of a statistic of n images, given the indices of a resample."""
    rng = np.random.default_rng(seed)
    return _middle([statistic(rng.integers(n, size=n)) for _ in range(draws)])


def difference(
    a: Statistic, b: Statistic, n: int, draws: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """a - b of the same n layouts, and its 95% interval: both get the same resample."""
    everything = np.arange(n)
    value = a(everything) - b(everything)
    return value, interval(lambda i: a(i) - b(i), n, draws, seed)


def over_trainings(
    statistic: Callable[[Cell], float],
    cells: Sequence[Cell],
    draws: int = 300,
    seed: int = 0,
    shared: bool = False,
) -> tuple[float, tuple[float, float]]:
    """A statistic's mean over trainings, and its 95% interval: they and their images resampled.

    shared: all trainings drew the same layouts, so a resample takes the same ones of each; its
    interval does not narrow with the number of trainings beyond what they differ by.
    """
    rng = np.random.default_rng(seed)

    def indices(cell: Cell) -> np.ndarray:
        count = len(next(iter(cell.values())))
        return rng.integers(count, size=count)

    def drawn() -> float:
        chosen = [cells[c] for c in rng.integers(len(cells), size=len(cells))]
        rows = [indices(chosen[0])] * len(cells) if shared else [indices(c) for c in chosen]
        found = [statistic(_rows(c, index)) for c, index in zip(chosen, rows, strict=True)]
        return float(np.mean(found))

    value = float(np.mean([statistic(cell) for cell in cells]))
    return value, _middle([drawn() for _ in range(draws)])


def _rows(cell: Cell, index: np.ndarray) -> Cell:
    return {name: values[index] for name, values in cell.items()}


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """What 95% of the values lie between."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
