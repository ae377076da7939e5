"""Checkpoints of a training: the last two are kept, and a damaged one gives way to the other."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.train.durable import put

NEWEST, OLDER = "checkpoint.safetensors", "checkpoint-before.safetensors"


class Checkpoint:
    """One file, open: `facts` beside the tensors. Raises what safetensors does if it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self.file = safe_open(path, "pt")
        self.facts: dict[str, Any] = {
            k: json.loads(v) for k, v in (self.file.metadata() or {}).items()
        }
        self.step: int = self.facts["step"]

    def names(self, kind: str = "") -> list[str]:
        """Names of the tensors that begin with `kind`."""
        return [k for k in self.file.keys() if k.startswith(kind)]  # noqa: SIM118

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a kind, without reading them."""
        return {k: tuple(self.file.get_slice(k).get_shape()) for k in self.names(kind)}

    def tensor(self, name: str) -> Tensor:
        """A tensor by name."""
        return self.file.get_tensor(name)


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Writes the newest checkpoint; the one before stays as the older."""
    path = folder / NEWEST
    part = folder / f"{NEWEST}.part"
    save_file(tensors, part, metadata={k: json.dumps(v) for k, v in facts.items()})
    if _opened(path)[0]:  # of a kill after the next line the older one is left, and read
        os.replace(path, folder / OLDER)
    put(part, path)


def last_checkpoint(folder: Path, quiet: bool = False) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none.

    A warning names one that is damaged. Raises GuidekitError if no other is there.
    """
    (newest, damage), (older, more) = (_opened(folder / name) for name in (NEWEST, OLDER))
    if newest is not None:
        return newest
    damage = damage or more
    if damage and older is None:
        raise GuidekitError(f"{damage}, and no other is whole; remove it to start again")
    if damage and not quiet:
        warnings.warn(f"{damage}; {OLDER}, of step {older.step}, is used instead", stacklevel=3)
    return older


def _opened(path: Path) -> tuple[Checkpoint | None, str]:
    """A checkpoint, or none and what is wrong with it; nothing is wrong with one that is absent."""
    if not path.exists():
        return None, ""
    try:
        return Checkpoint(path), ""
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        return None, f"{path} is damaged ({error})"
