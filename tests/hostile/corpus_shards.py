"""Tar files of images from the web."""

import io
import tarfile
from pathlib import Path

from corpus import EPS, Make, deep, file, write
from corpus_pictures import BOMB

PAGE = b'{"page_url": "p"}'
Members = list[tuple[str, bytes]]


def tar(path: Path, members: Members, kinds: dict[str, bytes] | None = None) -> Path:
    """A shard; kinds: types of members that are no files."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as into:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = (kinds or {}).get(name, tarfile.REGTYPE)
            info.linkname = "/etc/passwd" if info.islnk() or info.issym() else ""
            into.addfile(info, io.BytesIO(data))
    return path


def _sample(key: str = "0", picture: bytes = EPS, page: bytes = PAGE) -> Make:
    """A shard of one image and what is said of it."""
    members = [(f"{key}.jpg", picture), (f"{key}.json", page)]
    return lambda folder: tar(folder / "0.tar", members)


def _linked(kind: bytes) -> Make:
    """A shard whose image is no file."""
    members = [("0.jpg", b""), ("0.json", PAGE)]
    return lambda folder: tar(folder / "0.tar", members, {"0.jpg": kind})


def _sized(size: bytes) -> Make:
    """The first member's header says another size, and its checksum is right."""

    def make(folder: Path) -> Path:
        path = _sample()(folder)
        data = bytearray(path.read_bytes())
        data[124:136] = size
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        return write(path, bytes(data))

    return make


def _cut(folder: Path) -> Path:
    return write(folder / "0.tar", _sample()(folder).read_bytes()[:700])


def _headers(count: int) -> Make:
    """Headers of long names, each of which announces the next."""
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    return file("0.tar", info.tobuf(tarfile.GNU_FORMAT) * count)


def _parts(folder: Path) -> Path:
    return tar(folder / "0.tar", [(f"0.x{i}", b"x" * 1000) for i in range(500)])


KEYS = ("../../x", "/x", "a/../../../x", "..\\x", "a\x1b[2J")
SHARDS: dict[str, Make] = {
    **{f"member {key!r}": _sample(key) for key in KEYS},
    "empty": file("0.tar", b""),
    "no tar": file("0.tar", b"x" * 2000),
    "cut": _cut,
    "negative size": _sized(b"\xff" * 12),
    "endless size": _sized(b"77777777777\0"),
    "size of letters": _sized(b"zzzzzzzzzzz\0"),
    "thousands of headers": _headers(3000),
    "a link": _linked(tarfile.SYMTYPE),
    "a hard link": _linked(tarfile.LNKTYPE),
    "a device": _linked(tarfile.CHRTYPE),
    "a pipe": _linked(tarfile.FIFOTYPE),
    "deep": _sample(page=deep().encode()),
    "page is nothing": _sample(page=b'{"page_url": null}'),
    "no json": _sample(page=b"\xff\xfe"),
    "a bomb": _sample(picture=BOMB),
    "hundreds of parts": _parts,
}
