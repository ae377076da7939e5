"""What a stage is: the options and data that decide its weights, kept beside its checkpoints."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from guidekit.errors import GuidekitError
from guidekit.train.durable import put_text

FILE = "stage.json"
# Options that change no weight, but for the order of sums.
NEUTRAL = {
    "compile",
    "checkpointing",
    "store",
    "save_every",
    "preview_every",
    "log_every",
    "agree_every",
    "workers",
    "tracker",
    "minutes",
    "changed",
}
READ = 256  # files of a folder that are read, spread over all
BEGINNING = 2**20  # bytes of each


def identity(task: str, size: int, loop: Any, own: Any, facts: dict[str, Any]) -> dict[str, str]:
    """What decides a stage's weights, as text by name: options of loop and task, facts of data."""
    table = {k: v for k, v in dataclasses.asdict(loop).items() if k not in NEUTRAL}
    table |= dataclasses.asdict(own) | {"task": task, "size": size}
    return {k: str(v) for k, v in table.items()} | {k: str(v) for k, v in facts.items()}


def check_same(folder: Path, now: dict[str, str], changed: str) -> bool:
    """Whether the stage in `folder`, if there is one, is the one of `now`.

    changed: "allow" turns the refusal of another into a warning. Raises GuidekitError that names
    what differs.
    """
    before = _read(folder / FILE)
    if (folder / "model").exists():  # nothing goes on: with how many, or from data that are gone
        before = {k: v for k, v in before.items() if k in now and k != "processes"}
    other = [
        f"{k} {before[k]}, not {now.get(k, 'absent')}" for k in before if before[k] != now.get(k)
    ]
    if not other:
        return True
    text = f"{folder} was begun with {'; '.join(other)}"
    if changed != "allow":
        raise GuidekitError(
            f"{text}: train into another folder (--out), remove it, or go on all the same with "
            "--set changed=allow"
        )
    warnings.warn(f"{text}; it goes on all the same", stacklevel=3)
    return False


def keep(folder: Path, now: dict[str, str]) -> None:
    """Writes down what the stage is."""
    folder.mkdir(parents=True, exist_ok=True)
    put_text(folder / FILE, json.dumps(now, indent=1) + "\n")


def _read(path: Path) -> dict[str, str]:
    """What was written down; nothing where nothing was."""
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise GuidekitError(f"{path} is damaged; remove it, and the stage goes on unchecked")
    return table


def digest_of(root: Path, paths: Iterable[Path] | None = None) -> str:
    """A name of the files below `root`: names and sizes of all, the beginnings of up to 256.

    paths: those that count, in a fixed order; None for all.
    """
    if paths is None:
        paths = sorted(p for p in root.rglob("*") if p.is_file())
    digest, kept, every = hashlib.sha256(), [], 1
    for number, path in enumerate(paths):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode(errors="replace"))
        if number % every == 0:
            kept.append(path)
        if len(kept) > READ:  # of any number of files, 129 to 256 evenly spread
            kept, every = kept[::2], every * 2
    for path in kept:
        with open(path, "rb") as file:
            digest.update(file.read(BEGINNING))
    return digest.hexdigest()[:16]
