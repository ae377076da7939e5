"""Where the kernel is faster than SDPA: a table of times that GPUs gave, by kind and shape.

`timings.json` holds a row per shape: microseconds of one layer, forward and backward, by "sdpa"
(the weights beside V, as `guidekit.attention.call` runs it in half precision) and by "kernel"; the
GPU's name and compute capability, and the date. `python benchmarks/attention_map.py --timings
kernels/guidekit_kernels/timings.json` on a GPU replaces the rows of its capability.
"""

import functools
import json
import math
from pathlib import Path

import torch
from torch import Tensor

TIMINGS = Path(__file__).with_name("timings.json")


@functools.cache
def table() -> list[dict]:
    """The rows of `timings.json`."""
    return json.loads(TIMINGS.read_text())


def measured(capability: tuple[int, int]) -> str | None:
    """The GPU on which rows of a compute capability were measured, None if there are none."""
    return next((row["device"] for row in _rows(capability)), None)


def faster(query: Tensor, key: Tensor) -> bool:
    """Whether the kernel was faster than SDPA at the nearest of the shapes measured."""
    b, h, n, d = query.shape
    row = nearest(torch.cuda.get_device_capability(query.device), n * b, key.shape[2], d, h)
    return row is not None and row["us"]["kernel"] < row["us"]["sdpa"]


def nearest(capability: tuple[int, int], n: int, t: int, d: int, h: int) -> dict | None:
    """The row of a compute capability whose shape is nearest in the logarithms."""

    def distance(row: dict) -> float:
        sizes = ((row["n"], n), (row["t"], t), (row["d"], d), (row["h"], h))
        return sum(math.log2(a / b) ** 2 for a, b in sizes)

    return min(_rows(capability), key=distance, default=None)


def _rows(capability: tuple[int, int]) -> list[dict]:
    return [row for row in table() if tuple(row["capability"]) == tuple(capability)]
