"""Hostile inputs, made by code: NAME -> make(folder), which writes one and returns what to load.

Every one is refused: its loader raises a ValueError whose text is one line. Of shards, which are
read past what is damaged, no item has an image. The kinds are in corpus_*.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

RAN = "RAN"  # a file that hostile code makes
CODE = f"import pathlib\npathlib.Path(__file__).with_name({RAN!r}).touch()\n"
NAMES = (  # that are no names of a folder
    "../x",
    "/x",
    "a/../../x",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "C:\\x",
    "\0",
    "a\x1b[2J",
    "\u202ea",
)
PATHS = ("../x.png", "/x.png", "a/../../x.png", "..", "..\\x.png", "C:\\x.png")  # out of a folder
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
PICKLE = b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
Make = Callable[[Path], Path]


def write(path: Path, data: str | bytes | dict | list) -> Path:
    """The file with text, bytes, or what JSON makes of anything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, dict | list):
        data = json.dumps(data)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return path


def file(name: str, data: str | bytes | dict | list, *beside: Make) -> Make:
    """What makes a file of this name, after those beside it."""

    def make(folder: Path) -> Path:
        for other in beside:
            other(folder)
        return write(folder / name, data)

    return make


def deep(count: int = 100_000) -> str:
    """JSON that no recursive reader survives."""
    return "[" * count
