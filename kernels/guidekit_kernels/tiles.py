"""Tile sizes of the attention kernels per head size, number of keys and architecture.

A static table in place of an autotuner: the first call runs what the thousandth runs. A slow test
compiles every entry ahead of time, within the shared memory of its architecture. The numbers
come from those compilations (registers, spills, shared memory), not from timings: no GPU
was at hand.
"""

import functools
from dataclasses import dataclass, replace

import torch

MAX_HEAD = 256
FEW = 128  # keys that one block can hold: cross-attention with the 77 tokens of CLIP


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one block, warps of a program, buffers of its pipelined loads."""

    rows: int
    keys: int
    warps: int
    stages: int


# Per architecture, kernel and padded head size: with at most FEW keys, and with more. 80 stands for
# all whose tensor cores a warp feeds from registers, sm_80 to sm_89 and sm_120: its tiles fit in
# the 99 KB of the smaller ones, and sm_100, where tiles of 90 spill. 90 is sm_90 with its 227 KB.
# There is no block of FEW keys for the gradient of d > 128.
_TABLE = {
    90: {
        "forward": {
            # With one buffer ptxas 12.8, of triton 3.6, reads other memory than W: maps were wrong.
            32: (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2)),
            64: (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2)),
            128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3)),
            256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        },
        "query": {
            32: (Tile(128, 128, 8, 1), Tile(128, 64, 8, 2)),
            64: (Tile(128, 128, 8, 1), Tile(128, 64, 8, 2)),
            128: (Tile(32, 128, 4, 1), Tile(128, 64, 8, 2)),
            256: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        },
        "key": {
            32: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
            64: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
            128: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
            256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        },
    },
    80: {
        "forward": {
            32: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
            64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3)),
            128: (Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
            256: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        },
        "query": {
            32: (Tile(32, 128, 8, 1), Tile(128, 64, 8, 2)),
            64: (Tile(32, 128, 8, 1), Tile(128, 64, 8, 2)),
            128: (Tile(32, 128, 8, 1), Tile(64, 32, 8, 2)),
            256: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        },
        "key": {
            32: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
            64: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
            128: (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
            256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        },
    },
}


# fp32 on every architecture, whatever the number of keys: exact products run on no tensor core and
# are unrolled over the head, so that only small tiles stay in registers.
_FP32 = {
    "forward": {
        32: Tile(32, 32, 8, 1),
        64: Tile(64, 32, 8, 1),
        128: Tile(32, 32, 8, 1),
        256: Tile(32, 16, 8, 1),
    },
    "query": {
        32: Tile(32, 32, 8, 1),
        64: Tile(32, 32, 8, 1),
        128: Tile(16, 16, 8, 1),
        256: Tile(16, 16, 4, 2),
    },
    "key": {
        32: Tile(32, 32, 8, 1),
        64: Tile(32, 32, 8, 1),
        128: Tile(16, 16, 8, 1),
        256: Tile(16, 16, 4, 1),
    },
}


def tile(kernel: str, d: int, t: int, itemsize: int, arch: int) -> Tile:
    """Tile of "forward", "query" (dQ) or "key" (dK, dV) for head size d and t keys."""
    few, many = _TABLE[arch][kernel][padded(d)]
    chosen = few if t <= FEW else many
    if itemsize == 4:
        chosen = _FP32[kernel][padded(d)]
    return replace(chosen, keys=min(chosen.keys, max(16, 1 << (t - 1).bit_length())))


def one_block(d: int, t: int, itemsize: int, arch: int) -> bool:
    """Whether the dQ kernel holds all keys at once, so that forward has nothing to save for it."""
    return t <= tile("query", d, t, itemsize, arch).keys


def padded(d: int) -> int:
    """Head size of a tile, a power of two from 32: 40 runs as 64, 72 as 128, 160 as 256."""
    return max(32, 1 << (d - 1).bit_length())


def heads_per_program(b: int, h: int, n: int, rows: int, processors: int) -> int:
    """Most heads, dividing h, that one program can sum while every processor gets two programs."""
    blocks = -(-n // rows) * b
    fitting = [g for g in range(1, h + 1) if h % g == 0 and blocks * (h // g) >= 2 * processors]
    return max(fitting, default=1)


def parts(programs: int, n: int, rows: int, processors: int) -> int:
    """Parts to cut the queries of dK and dV in: few keys alone would leave processors idle.

    No part gets fewer than four blocks of queries.
    """
    return max(1, min(-(-2 * processors // programs), n // (4 * rows)))


@functools.cache
def architecture(device: torch.device) -> int:
    """Row of the table for a device; the interpreter on a CPU runs that of sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"the attention kernels need compute capability 8.0, not {major}.{minor}; "
            "set GUIDEKIT_ATTENTION=sdpa"
        )
    return 90 if major == 9 else 80


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
