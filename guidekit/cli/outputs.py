"""The folder of a run: pictures, masks and run.json, written as soon as they exist."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from guidekit.conditions import Segment
from guidekit.errors import GuidekitError
from guidekit.images import mask_image, replacing, save_picture

PACKAGES = ("guidekit", "torch", "diffusers", "transformers", "safetensors", "numpy", "triton")


def slug(text: str, length: int = 40) -> str:
    """The text's first words in small letters, joined by hyphens, for file names."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return words[:length].rstrip("-") or "picture"


def new_folder(out: Path | None, prompt: str) -> Path:
    """Makes `out`, by default out/<date>-<prompt>; a name that exists gets -2, -3 and so on.

    An empty folder that exists is used as it is. Raises GuidekitError if it cannot be made.
    """
    today = datetime.date.today().isoformat()
    base = Path("out") / f"{today}-{slug(prompt)}" if out is None else out
    if not base.name or base.is_file():
        what = "is a file" if base.name else "has no name of its own"
        raise GuidekitError(f"output folder {base}: it {what}; choose another with --out")
    folder, number = base, 1
    try:
        while _taken(folder):
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"no permission to write in {folder}")
    except OSError as error:
        reason = error.strerror or error
        raise GuidekitError(f"output folder {base}: {reason}; choose another with --out") from None
    return folder


def _taken(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def discard_empty(folder: Path) -> None:
    """Removes a folder in which nothing was written."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def save_segments(segments: tuple[Segment, ...], folder: Path) -> list[dict[str, Any]]:
    """The tables [[segment]] of run.json; masks that did not come from a box become files."""
    tables = []
    for index, segment in enumerate(segments):
        table: dict[str, Any] = {"phrase": segment.phrase}
        if segment.box is not None:
            table["box"] = list(segment.box)
        else:
            table["mask"] = f"masks/{index}-{slug(segment.phrase)}.png"
            save_picture(mask_image(segment.mask), folder / table["mask"])
        table |= {"strength": segment.strength, "negative": segment.negative}
        if segment.prompt is not None:
            table["prompt"] = segment.prompt
        tables.append(table)
    return tables


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Writes run.json; the old one stays until the new one is complete."""
    with replacing(folder / "run.json") as part:
        part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of the installed packages that a picture depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What of this machine a picture depends on."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def model_hash(folder: Path) -> str:
    """A short name of a pipeline directory's content: its index and the sizes of its weights."""
    digest = hashlib.sha256((folder / "model_index.json").read_bytes())
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}\n".encode())
    return digest.hexdigest()
