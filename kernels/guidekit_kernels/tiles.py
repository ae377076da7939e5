"""Tile sizes of the attention kernels per padded head size and architecture.

A static table in place of an autotuner: the first call runs what the thousandth runs. The numbers
come from compilations ahead of time (registers, spills, shared memory), not from timings; a test
repeats them.
"""

import functools
import os
from dataclasses import dataclass

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, for tests
MAX_HEAD = 160  # 128 where a program has less than `SHARED` bytes of shared memory
SHARED = 131072
MAX_KEYS = 128  # of one block: the 77 tokens of CLIP fit, the 300 of T5 do not
MAX_MAPS = 32  # more columns would not stay in registers


@dataclass(frozen=True)
class Tile:
    """Queries of one program, and its warps."""

    rows: int
    warps: int


# Per architecture and kernel, by padded head size. 80 stands for all but 9.0.
_TABLE = {
    90: {
        "forward": {64: Tile(128, 8), 128: Tile(128, 8), 256: Tile(64, 8)},
        "query": {64: Tile(128, 8), 128: Tile(64, 8), 256: Tile(64, 8)},
    },
    80: {
        "forward": {64: Tile(64, 8), 128: Tile(64, 8), 256: Tile(64, 8)},
        "query": {64: Tile(32, 8), 128: Tile(32, 8), 256: Tile(32, 8)},
    },
}


def tile(kernel: str, d: int, arch: int) -> Tile:
    """Tile of "forward" or "query" (dQ) for head size d."""
    return _TABLE[arch][kernel][padded(d)]


def padded(d: int) -> int:
    """Head size of a tile, a power of two from 64: 40 runs as 64, 80 as 128, 160 as 256."""
    return max(64, 1 << (d - 1).bit_length())


def key_block(t: int) -> int:
    """Keys of a tile, a power of two from 16."""
    return max(16, 1 << (t - 1).bit_length())


def map_block(s: int) -> int:
    """Map columns of a tile; 16 is the least that tensor cores multiply."""
    return 16 if s <= 16 else MAX_MAPS


@torch.compiler.assume_constant_result
def max_head(device: torch.device) -> int:
    """Largest head size that a device has the shared memory for: 128 on 8.6, 8.9 and 12.0."""
    if device.type != "cuda":
        return MAX_HEAD
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return MAX_HEAD if shared >= SHARED else 128


@functools.cache
def architecture(device: torch.device) -> int:
    """Row of the table for a device; the interpreter on a CPU runs that of 9.0."""
    if device.type != "cuda":
        return 90
    return 90 if torch.cuda.get_device_capability(device)[0] == 9 else 80
