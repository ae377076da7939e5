"""Files that are called images."""

import io
import os
import struct
import zlib
from pathlib import Path

from PIL import Image

from corpus import EPS, Make, file, write


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size; its data are of one row of nothing."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" * 16)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(kind: str, size: tuple[int, int] = (8, 8), mode: str = "RGB", **options) -> bytes:
    """An image as the bytes of a file."""
    into = io.BytesIO()
    Image.new(mode, size).save(into, kind, **options)
    return into.getvalue()


def pipe(folder: Path) -> Path:
    """A pipe that nobody writes to: whoever opens it waits."""
    os.mkfifo(folder / "a.png")
    return folder / "a.png"


def _folder(folder: Path) -> Path:
    (folder / "a.png").mkdir()
    return folder / "a.png"


def _gif(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\0;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0" * 6 + frame


def _bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 64, 0, 0, 54) + head


BOMB = png(2**20, 2**20)
PICTURES: dict[str, Make] = {
    "postscript": file("a.jpg", EPS),
    "pdf": file("a.png", encoded("PDF")),
    "ppm": file("a.png", encoded("PPM")),
    "icon": file("a.png", encoded("ICO")),
    "jpeg 2000": file("a.jpg", b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 64),
    "svg": file("a.png", '<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "bomb": lambda f: write(f / "a.png", encoded("PNG", (13_000, 13_000), "1")),
    "bomb of few bytes": file("a.png", png(2**31 - 1, 2**31 - 1)),
    "gif bomb": file("a.gif", _gif(65535, 65535)),
    "bmp bomb": file("a.bmp", _bmp(2**30, 2**30)),
    "tiff of endless tags": file("a.tif", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 64),
    "no area": file("a.png", png(0, 0)),
    "cut": file("a.png", encoded("PNG")[:40]),
    "text bomb": lambda f: write(
        f / "a.png", png(1, 1, (b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 2**27)))
    ),
    "empty": file("a.png", b""),
    "a folder": _folder,
    "a pipe": pipe,
}
