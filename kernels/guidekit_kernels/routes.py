"""Which way through the kernels is fastest: a table of times per architecture and shape.

`timings.json` holds one row per shape: layer microseconds, forward and backward, of

    sdpa    torch alone, as `guidekit.attention.call` runs it in half precision
    fused   the kernels of `attention_map`
    vendor  `attention_map_joint`: stock kernels for the output, the chosen columns beside them

and where they are from: "source" is "measured", with the GPU's name, or "model", bytes and FLOP at
an H200's rates. `python benchmarks/attention_map.py --timings kernels/timings.json` on a GPU
replaces the rows of its architecture by measured ones; without a GPU it writes the model's.
"""

import functools
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from guidekit_kernels import attention_map, attention_map_joint, tiles

TIMINGS = Path(__file__).with_name("timings.json")
MOST_COLUMNS = 64  # keys with weight, up to which the vendor's route is a small addition


@functools.cache
def table() -> list[dict]:
    """The rows of `timings.json`."""
    return json.loads(TIMINGS.read_text())


def nearest(arch: int, joint: bool, n: int, t: int, d: int, h: int) -> dict | None:
    """The row of an architecture whose shape is nearest in the logarithms; None if it has none.

    Joint attention is compared with joint attention only.
    """

    def distance(row: dict) -> float:
        sizes = ((row["n"], n), (row["t"], t), (row["d"], d), (row["h"], h))
        return sum(math.log2(a / b) ** 2 for a, b in sizes)

    rows = [row for row in table() if row["arch"] == arch and row["joint"] == joint]
    return min(rows, key=distance, default=None)


def measured(arch: int) -> str | None:
    """The GPU on which rows of an architecture were measured, None if they are a model's."""
    rows = [row for row in table() if row["arch"] == arch and row["source"] == "measured"]
    return rows[0]["device"] if rows else None


def fastest(query: Tensor, key: Tensor, among: tuple[str, ...]) -> str:
    """The route in `among` with the least time for these sizes; the first where no row is known."""
    b, h, n, d = query.shape
    row = nearest(tiles.architecture(query.device), key.requires_grad, n * b, key.shape[2], d, h)
    known = {} if row is None else {name: row["us"][name] for name in among if name in row["us"]}
    return min(known, key=known.get, default=among[0])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    rows: slice = slice(None),
    reduce: str = "mean",
    columns: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and maps by the fused kernels or around the vendor's, whichever the table favours.

    As `attention_map.attend`. `columns` (K,) are the keys with weight, where they are known; the
    vendor's route is taken only with them, since to find them would wait for the GPU.
    """
    query, key, value = attention_map.autocast(query, key, value)
    if route(query, key, value, mask, columns, bias) == "vendor":
        return attention_map_joint.attend(query, key, value, weights, columns, scale, rows, reduce)
    return attention_map.attend(query, key, value, weights, mask, scale, rows, reduce, bias=bias)


def route(query, key, value, mask=None, columns=None, bias=None) -> str:
    """The name of the way that a call takes: fused or vendor."""
    few = columns is not None and len(columns) <= MOST_COLUMNS
    if not few or bias is not None or not (key.requires_grad and torch.is_grad_enabled()):
        return "fused"
    if attention_map_joint.vendor(query, key, value, mask)[0] is None:
        return "fused"
    return fastest(query, key, ("fused", "vendor"))
