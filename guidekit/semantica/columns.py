"""Columns of rows in one safetensors file, read row by row without keeping what was read.

Memory maps count as resident what they ever touched, which grows with the data; these reads do not.
"""

import itertools
import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from guidekit.errors import GuidekitError
from guidekit.system.untrusted import parse_json
from guidekit.train.durable import put

LARGEST = 2**20  # bytes of a header; those written here have no texts in it
TYPES = {"U8": "u1", "F16": "<f2", "F32": "<f4", "I64": "<i8", "U64": "<u8", "I32": "<i4"}


def write_columns(path: Path, columns: dict[str, np.ndarray], facts: dict) -> None:
    """Writes columns and facts as a file that appears only when it is complete."""
    part = path.with_name(f"{path.name}.part")
    arrays = {k: np.ascontiguousarray(v) for k, v in columns.items()}
    save_file(arrays, part, metadata={"facts": json.dumps(facts)})
    put(part, path)


class Columns:
    """An open file of columns. Raises GuidekitError that names a damaged one."""

    def __init__(self, path: Path):
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.close()
            raise GuidekitError(
                f"{path} is damaged ({error}); remove it, and it is made anew"
            ) from None

    def _read_header(self) -> None:
        size = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if not 2 <= size <= LARGEST:
            raise ValueError("no header")
        table = parse_json(os.pread(self._file, size, 8))
        self.facts: dict = parse_json(table.pop("__metadata__")["facts"])
        self._columns, end = {}, 0
        for name, entry in table.items():
            first, last = entry["data_offsets"]
            kind, shape = np.dtype(TYPES[entry["dtype"]]), tuple(entry["shape"])
            if last - first != kind.itemsize * int(np.prod(shape)):
                raise ValueError(f"column {name} has another size")
            self._columns[name], end = (kind, shape, 8 + size + first), max(end, last)
        if os.fstat(self._file).st_size != 8 + size + end:
            raise ValueError("it is cut")

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def length(self, name: str) -> int:
        """Number of rows of a column."""
        return self._columns[name][1][0]

    def read(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows `first` to `last` of a column, all of them by default."""
        kind, shape, place = self._columns[name]
        last = shape[0] if last is None else last
        row = kind.itemsize * int(np.prod(shape[1:]))
        found = os.pread(self._file, (last - first) * row, place + first * row)
        return np.frombuffer(found, kind).reshape(last - first, *shape[1:])

    def texts(self, name: str, first: int, last: int) -> list[str]:
        """Texts of rows, as `packed` made them."""
        ends = self.read(f"{name}_end", max(first - 1, 0), last)
        ends = ends if first else np.concatenate([[0], ends])
        start = int(ends[0])
        content = self.read(name, start, int(ends[-1])).tobytes()
        cuts = [int(e) - start for e in ends]
        return [content[a:b].decode("utf-8", "surrogatepass") for a, b in itertools.pairwise(cuts)]

    def close(self) -> None:
        """Gives the file back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self):
        self.close()


def packed(name: str, texts: list[str]) -> dict[str, np.ndarray]:
    """Texts as two columns: all their bytes, and where each ends."""
    parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    ends = np.cumsum([len(p) for p in parts], dtype=np.int64)
    return {name: np.frombuffer(b"".join(parts), np.uint8), f"{name}_end": ends}
