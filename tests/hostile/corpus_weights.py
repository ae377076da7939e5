"""Headers of safetensors, and heads that have them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from corpus import PICKLE, Make, deep, file, write


def header(table: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(shape: list, first: int, last: int, kind: str = "F32") -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": [first, last]}


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "length alone": b"\x08\0\0\0\0\0\0\0",
    "length of everything": struct.pack("<Q", 2**64 - 1) + b"{}",
    "length of a gigabyte": header({}, length=2**30),
    "no json": header(b"not json"),
    "a list": header([1]),
    "deep": header(deep(5000).encode()),
    "no utf-8": header(b'{"\xff": 1}'),
    "data are missing": header({"a": _tensor([1000], 0, 4000)}),
    "negative offsets": header({"a": _tensor([1], -4, 0)}, b"\0" * 4),
    "offsets turned around": header({"a": _tensor([1], 4, 0)}, b"\0" * 4),
    "tensors overlap": header({"a": _tensor([1], 0, 4), "b": _tensor([1], 0, 4)}, b"\0" * 4),
    "a hole": header({"a": _tensor([1], 4, 8)}, b"\0" * 8),
    "shape over the data": header({"a": _tensor([2**40, 2**40], 0, 4)}, b"\0" * 4),
    "negative shape": header({"a": _tensor([-1], 0, 4)}, b"\0" * 4),
    "no such type": header({"a": _tensor([1], 0, 4, "PY")}, b"\0" * 4),
    "a pickle": PICKLE,
    "a zip": b"PK\x03\x04" + b"\0" * 60,
}


def _folder(folder: Path) -> Path:
    (folder / "a.safetensors").mkdir()
    return folder / "a.safetensors"


WEIGHTS: dict[str, Make] = {name: file("a.safetensors", data) for name, data in HEADERS.items()}
WEIGHTS["a folder"] = _folder


def head(folder: Path, change: Callable[[dict], object] = lambda table: None) -> Path:
    """A head of two channels whose table is changed; `change` may give another table."""
    table = {
        "format": 2,
        "kind": "classes",
        "classes": ["a", "b"],
        "channels": 2,
        "hidden": [],
        "reading": {"sites": ["mid_block"], "timesteps": [500], "pool": 1},
        "backbone": {"class": "UNet2DModel", "shapes": "0" * 64},
    }
    table = change(table) or table
    weights = {"mean": torch.zeros(2), "std": torch.ones(2), "temperature": torch.ones(())}
    weights |= {"net.0.weight": torch.zeros(2, 2, 1, 1), "net.0.bias": torch.zeros(2)}
    save_file({f"readouts.0.{k}": v for k, v in weights.items()}, folder / "head.safetensors")
    write(folder / "head.json", table)
    return folder


def _of(key: str, value: object) -> Make:
    return lambda folder: head(folder, lambda table: table.update({key: value}))


def _with(name: str, data: str | bytes) -> Make:
    return lambda folder: write(head(folder) / name, data).parent


VALUES = {
    "kind": ("pickle", ["classes"]),
    "classes": ("ab", [1, 2], {"a": 1}, ["a"] * 10**6),
    "channels": (10**12, -1, 2**30, "2", True),
    "hidden": ([2**30] * 4, [1] * 10**5, 3),
    "grid": ([1], ["a", "b"]),
    "reading": (
        None,
        {},
        {"sites": "x", "timesteps": [1]},
        {"sites": ["x"], "timesteps": [1], "more": 1},
        {"sites": ["x"], "timesteps": [1] * 10**5, "noised": True},
    ),
    "backbone": ({}, [], {"class": 1, "shapes": None}),
    "more": (1,),
    "__class__": ("x",),
    "format": (1, 3, None),
    "values": ([1.5],),
}
HEADS: dict[str, Make] = {
    f"{key} {number}": _of(key, value)
    for key, values in VALUES.items()
    for number, value in enumerate(values)
} | {
    "deep": _with("head.json", deep()),
    "a list": _with("head.json", "[1]"),
    "nothing": _with("head.json", "null"),
    "no utf-8": _with("head.json", b"\xff\xfe"),
    "a number of a million digits": _with("head.json", "1" * 10**6),
    "no weights": _with("head.safetensors", b""),
    "weights of a pickle": _with("head.safetensors", PICKLE),
}
