"""Files that a request brings: written into a folder of their own, each checked, none trusted."""

import base64
import binascii
import os
from pathlib import Path
from typing import Any

from guidekit.errors import GuidekitError
from guidekit.serve.options import Limits
from guidekit.system.untrusted import file_name, inside, open_image, read_json

PICTURES = (".jpeg", ".jpg", ".png", ".webp")
SUFFIXES = (*PICTURES, ".json")
MOST_FILES = 64
LONGEST, MOST_PARTS = 255, 8  # characters of a file's name; its folders and itself
REQUEST = "request.json"  # where the request's own tables lie beside its files


def write_file(name: str, text: Any, folder: Path, limits: Limits) -> Path:
    """A file of a request, in base64, written below `folder`.

    Raises GuidekitError for a name that leads out of it, another kind of file, or a huge image.
    """
    path = inside(folder, name, "file")
    if len(name) > LONGEST or len(path.relative_to(folder).parts) > MOST_PARTS:
        raise GuidekitError(
            f"a file's name has {LONGEST} characters and {MOST_PARTS} parts at most; "
            f"{name[:40]!r}... has more"
        )
    for part in path.relative_to(folder).parts:
        file_name(part, "a part of a file's name")
    if path.suffix.lower() not in SUFFIXES or path.name == REQUEST:
        raise GuidekitError(f"file {name!r}: a request brings {', '.join(SUFFIXES)} files")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise GuidekitError(f"file {name!r} is not written in base64") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except (FileExistsError, IsADirectoryError, NotADirectoryError):
        raise GuidekitError(f"file {name!r} is a folder of another file; rename one") from None
    if path.suffix.lower() in PICTURES:
        _check_picture(path, name, limits)
    else:
        _check_json(path, name)
    return path


def _check_json(path: Path, name: str) -> None:
    """Raises GuidekitError for what is no JSON that can be sent again."""
    try:
        read_json(path, sent=True)
    except GuidekitError as error:
        raise GuidekitError(f"file {name!r} is not readable JSON ({error})") from None


def _check_picture(path: Path, name: str, limits: Limits) -> None:
    """Raises GuidekitError for what is no image, or too large a one, before it is decoded."""
    try:
        with open_image(path) as image:
            pixels = image.width * image.height
    except Exception as error:  # Pillow's decoders pass on whatever they meet
        raise GuidekitError(f"file {name!r}: not a readable image ({error})") from None
    if pixels > limits.pixels:
        raise GuidekitError(f"file {name!r} has {pixels} pixels; {limits.pixels} at most are read")


def write_files(files: dict[str, Any], folder: Path, limits: Limits) -> set[str]:
    """The names of a request's files, which are written into the new `folder`; as `write_file`."""
    if len(files) > MOST_FILES:
        raise GuidekitError(f"a request brings {MOST_FILES} files at most, not {len(files)}")
    folder.mkdir(parents=True)
    for name, text in files.items():
        write_file(name, text, folder, limits)
    return set(files)


def check_layouts(layouts: list[tuple[Any, Path]], limits: Limits) -> None:
    """Raises GuidekitError for more segments, or larger masks, than memory is taken for.

    layouts: each with the folder of its files. What is wrong with one besides is said by who reads
    it.
    """
    masks = []
    for layout, folder in layouts:
        segments = layout.get("segments") if isinstance(layout, dict) else None
        if not isinstance(segments, list):
            continue
        if len(segments) > limits.segments:
            raise GuidekitError(f"a layout has {limits.segments} segments at most here")
        own = [entry for entry in segments if isinstance(entry, dict)]
        masks += [(folder, entry["mask"]) for entry in own if "mask" in entry]
        masks += [(folder, layout.get("map")) for entry in own if "value" in entry]
    if sum(_pixels(*mask) for mask in masks) > limits.masks:
        raise GuidekitError(f"the masks of a layout have {limits.masks} pixels at most here")


def _pixels(folder: Path, name: Any) -> int:
    """Pixels of an image of a request; 0 of what is none, or not there."""
    if not isinstance(name, str):
        return 0
    path = inside(folder, name, "file")
    if path.suffix.lower() not in PICTURES or not os.path.isfile(path):
        return 0
    with open_image(path) as image:
        return image.width * image.height
