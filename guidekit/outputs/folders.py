"""The folder of a run: images, masks and run.json, written as soon as they exist."""

import base64
import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from guidekit.conditions import Segment
from guidekit.errors import GuidekitError
from guidekit.images import mask_image, replacing, save_image

PACKAGES = ("guidekit", "torch", "diffusers", "transformers", "safetensors", "numpy", "triton")
RECORD = "run.json"
CARRIED = 2**20  # characters of files in base64 that an image carries at most
CLAIM = f"{RECORD}.part"  # the record to come: whoever makes it has the folder


def slug(text: str, length: int = 40) -> str:
    """The text's first words in small letters, joined by hyphens, for file names."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if len(words) > length and "-" in words[: length + 1]:
        words = words[: length + 1].rpartition("-")[0]  # no word is cut
    return words[:length] or "image"


def new_folder(out: Path | None, prompt: str) -> Path:
    """Makes `out`, by default out/<date>-<prompt>; a name that is taken gets -2, -3 and so on.

    An empty folder that exists is used as it is. The folder is this run's alone, also if another
    process asks for the same name at the same moment. Raises GuidekitError if it cannot be made.
    """
    today = datetime.date.today().isoformat()
    base = Path("out") / f"{today}-{slug(prompt)}" if out is None else out
    if not base.name or base.is_file():
        what = "is a file" if base.name else "has no name of its own"
        raise GuidekitError(f"output folder {base}: it {what}; choose another with --out")
    folder, number = base, 1
    try:
        while not _claim(folder):
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
    except OSError as error:
        reason = error.strerror or error
        raise GuidekitError(f"output folder {base}: {reason}; choose another with --out") from None
    return folder


def _claim(folder: Path) -> bool:
    """Makes the folder this run's own; False if it is another's or holds anything."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if any(folder.iterdir()):
            return False
        (folder / CLAIM).touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):  # another run claimed it or gave it up meanwhile
        return False
    return True


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Removes the folder if what is done meanwhile fails before anything was written in it."""
    try:
        yield
    except BaseException:
        (folder / CLAIM).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            with contextlib.suppress(OSError):  # another run was given it since
                folder.rmdir()
        raise


def segment_tables(segments: tuple[Segment, ...]) -> list[dict[str, Any]]:
    """The tables [[segment]] of run.json; masks that did not come from a box are files."""
    return [_segment_table(index, segment) for index, segment in enumerate(segments)]


def _segment_table(index: int, segment: Segment) -> dict[str, Any]:
    if segment.box is None:
        place = {"mask": f"masks/{index}-{slug(segment.phrase)}.png"}
    else:
        place = {"box": list(segment.box)}
    table = {"phrase": segment.phrase, **place}
    table |= {"strength": segment.strength, "negative": segment.negative}
    tokens = None if segment.tokens is None else list(segment.tokens)
    more = {"prompt": segment.prompt, "occurrence": segment.occurrence, "tokens": tokens}
    return table | {name: value for name, value in more.items() if value is not None}


def save_masks(segments: tuple[Segment, ...], folder: Path) -> None:
    """Writes the masks that `segment_tables` names."""
    for segment, table in zip(segments, segment_tables(segments), strict=True):
        if "mask" in table:
            save_image(mask_image(segment.mask), folder / table["mask"])


def mask_files(segments: tuple[Segment, ...]) -> dict[str, bytes]:
    """The masks that `segment_tables` names, as PNGs."""
    found = {}
    for segment, table in zip(segments, segment_tables(segments), strict=True):
        if "mask" in table:
            buffer = io.BytesIO()
            mask_image(segment.mask).save(buffer, format="PNG")
            found[table["mask"]] = buffer.getvalue()
    return found


def carried(files: dict[str, bytes]) -> dict[str, Any]:
    """What an image carries of the files that its settings name: `files`, in base64.

    Files that do not fit into CARRIED characters are left out, and later ones that do are not.
    """
    found: dict[str, str] = {}
    left = CARRIED
    for name, content in files.items():
        text = base64.b64encode(content).decode()
        if len(text) <= left:
            found[name] = text
            left -= len(text)
    return {"files": found} if found else {}


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Writes run.json; the old one stays until the new one is complete."""
    with replacing(folder / RECORD) as part:
        part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed; by default those that an image depends on."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What of this machine an image depends on."""
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
