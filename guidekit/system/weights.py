"""Which weights a model has: the SHA-256 of its files."""

import hashlib
from pathlib import Path


def weight_hashes(path: Path) -> frozenset[str]:
    """SHA-256 of every file of weights in a folder, or of the one file."""
    found = set()
    for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
        with open(file, "rb") as handle:
            found.add(hashlib.file_digest(handle, "sha256").hexdigest())
    return frozenset(found)
