"""Files that are whole on the disk before they take the place of others."""

import os
from pathlib import Path


def put(part: Path, path: Path) -> None:
    """Renames a written file or folder to `path` once the disk holds it, also if power fails."""
    for file in part.rglob("*"):
        _sync(file)
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def put_text(path: Path, text: str) -> None:
    """Writes a text that appears only when it is complete."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    put(part, path)


def _sync(path: Path) -> None:
    """Waits until the disk holds the file, or the names in the folder."""
    if os.name == "nt" and path.is_dir():  # which Windows does not open
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
