"""Tars whose members are sorted by extension, so that those of a sample are no neighbours.

`tar --sort` by other keys and some tools write them: all images, then all texts about them.
"""

import contextlib
import itertools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from guidekit.system.untrusted import MOST_MEMBER

Members = list[tuple[str, tarfile.TarInfo]]  # kind and header


def split_name(name: str) -> tuple[str, str]:
    """Key and kind of a member: a/laion.v1/000.JPG is a/laion.v1/000 and jpg."""
    folder, _, name = name.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def is_scattered(path: Path) -> bool:
    """Whether the members of a sample are apart; two headers are read, or all if they look so."""
    names: list[tuple[str, str]] = []
    # tarfile passes on whatever a damaged header makes it meet.
    with contextlib.suppress(Exception), tarfile.open(path, "r:") as tar:
        for member in tar:
            names += [split_name(member.name)] if member.isfile() else []
            if len(names) == 2 and (names[0][0] == names[1][0] or names[0][1] != names[1][1]):
                return False
    keys = [key for key, _ in names]
    return len(list(itertools.groupby(keys))) > len(set(keys))


def scattered_samples(
    path: Path, place: int, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, dict[str, bytes] | None, int]]:
    """Keys and members of the samples after `place`, which is their number, and their places.

    wanted: kinds that are read; of others it is only known that they are there. A damaged tar ends
    in (name, None, place).
    """
    samples: dict[str, Members] = {}
    with tarfile.open(path, "r:") as tar:
        whole = _index(tar, samples) and ended(path, tar.offset)
        for number, (key, members) in enumerate(samples.items(), 1):
            if number > place:
                yield key, _read(tar, members, wanted), number
    if not whole and place <= len(samples):
        yield str(path), None, len(samples) + 1


def _index(tar: tarfile.TarFile, samples: dict[str, Members]) -> bool:
    """Adds the headers to the samples; whether all of them could be read."""
    try:
        for member in tar:
            if member.isfile() and member.size <= MOST_MEMBER:
                key, kind = split_name(member.name)
                samples.setdefault(key, []).append((kind, member))
    except Exception:  # as above
        return False
    return True


def _read(
    tar: tarfile.TarFile, members: Members, wanted: Callable[[str], bool]
) -> dict[str, bytes]:
    """The members of one sample by kind; one that is cut is not there."""
    parts: dict[str, bytes] = {}
    for kind, member in members:
        file = tar.extractfile(member) if wanted(kind) else None
        with contextlib.suppress(tarfile.ReadError):
            parts[kind if file else ""] = file.read() if file else b""
    return parts


def ended(path: Path, offset: int) -> bool:
    """Whether the archive says at `offset` that it ends; tarfile takes a damaged header for it."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
