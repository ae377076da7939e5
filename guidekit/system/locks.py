"""Locks: files that the system unlocks when the process that holds them ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from guidekit.errors import GuidekitError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(path: Path, needed: bool = True) -> Iterator[bool]:
    """Whether this process has the lock meanwhile; False if another has it.

    A file that a killed process left is locked by nobody, and is taken over. needed: whether a file
    system without locks is refused by GuidekitError; else all processes have all locks there.
    """
    handle = _take(path, needed)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)  # still locked, so that nobody else's is removed
        os.close(handle)


def _take(path: Path, needed: bool) -> int | None:
    """The open file of a lock that was free."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS and not needed:
                return handle
            os.close(handle)
            if isinstance(error, BlockingIOError):
                return None
            if error.errno in NO_LOCKS:
                raise GuidekitError(
                    f"the file system of {path.parent} has no locks; give each process a share of "
                    "its own, --shard 1/4 and so on"
                ) from None
            raise
        if _is_at(handle, path):
            break
        os.close(handle)  # its holder removed it between the two calls
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
    return handle


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == os.stat(path).st_ino
    except FileNotFoundError:
        return False


def holder(path: Path) -> str | None:
    """Who wrote a lock file, as host:pid; None where it is gone, or its process is known dead."""
    try:
        told = json.loads(path.read_text())
        host, pid = told["host"], int(told["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if gone(host, pid) else f"{host}:{pid}"


def gone(host: str, pid: int) -> bool:
    """Whether a process is known to have ended: it was on this machine and is no more."""
    return host == socket.gethostname() and not _lives(pid)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
