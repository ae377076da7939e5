"""Images to evaluate, as people have them: folders, runs, plans of blocks, WebDataset tars."""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL.Image import Image

from guidekit.errors import GuidekitError
from guidekit.images import as_rgb, load_image, numbered, upright
from guidekit.system.untrusted import MOST_MEMBER, open_image, parse_json, read_json, read_text

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
BESIDE = ("unguided", "overlay", "attention", "masks", "state")  # of a run's or plan's own folder
LONGEST = 2**16  # bytes of a prompt


@dataclass(frozen=True)
class ImageSet:
    """Images by key: what a file is called without its ending, a number without its zeros."""

    name: str
    #: What reads each image, when it is asked for.
    openers: dict[str, Callable[[], Image]]

    def __len__(self) -> int:
        return len(self.openers)

    @property
    def keys(self) -> list[str]:
        """Keys, numbers in their order."""
        return sorted(self.openers, key=numbered)

    def image(self, key: str) -> Image:
        """An image in 8 bits of red, green and blue. Raises GuidekitError for a damaged file."""
        return self.openers[key]()

    def batches(self, size: int, keys: list[str] | None = None) -> Iterator[list[Image]]:
        """All images, or those of the keys, `size` at a time."""
        keys = self.keys if keys is None else keys
        for i in range(0, len(keys), size):
            yield [self.image(key) for key in keys[i : i + size]]


def key_of(name: str) -> str:
    """The key of a file's name."""
    stem = PurePosixPath(name).name.partition(".")[0].removesuffix("_leftImg8bit")
    return str(int(stem)) if stem.isdecimal() and stem.isascii() else stem


def read_images(path: Path) -> ImageSet:
    """The images of a folder with its subfolders, of a run, of a plan, or of tars.

    Raises GuidekitError for a folder without images and for two images of one key.
    """
    if not path.exists():
        raise GuidekitError(f"images {path}: no such folder")
    found: dict[str, Callable[[], Image]] = {}
    where: dict[str, str] = {}
    for source, opener in (*_files(path), *_members(path)):
        key = _key(path, source)
        if key in found:
            raise GuidekitError(f"{path} has two images for {key!r}: {where[key]} and {source}")
        found[key], where[key] = opener, source
    if not found:
        raise GuidekitError(f"images {path}: no {', '.join(ENDINGS)} and no tar in it")
    return ImageSet(path.name or str(path), found)


def _key(path: Path, source: str) -> str:
    """The key of a file, after the folder that it is in where folders are classes."""
    own = PurePosixPath(source)
    nested = own.parent.name if len(own.parts) > 1 and not own.parent.name.isdecimal() else ""
    return f"{nested}/{key_of(source)}" if nested else key_of(source)


def _files(path: Path) -> Iterator[tuple[str, Callable[[], Image]]]:
    if path.is_file():
        return
    runs = [run.parent for run in path.rglob("run.json")]
    beside = {run / name for run in runs for name in (*BESIDE, "reference.png")}
    beside |= {run.parent / "sheet.png" for run in runs if run != path}  # of a grid
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in ENDINGS and not beside & {file, *file.parents}:
            yield file.relative_to(path).as_posix(), lambda file=file: load_image(file)


def _members(path: Path) -> Iterator[tuple[str, Callable[[], Image]]]:
    """The images of a tar, or of a folder's tars; their contents are read when asked for."""
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []
    for file in tars:
        try:
            with tarfile.open(file, "r:") as tar:
                entries = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
        except (tarfile.TarError, OSError) as error:
            raise GuidekitError(f"{file} is not a readable tar ({error})") from None
        for name, offset, size in entries:
            if PurePosixPath(name).suffix.lower() in ENDINGS:
                yield PurePosixPath(name).name, _member(file, name, offset, size)


def _member(file: Path, name: str, offset: int, size: int) -> Callable[[], Image]:
    def opened() -> Image:
        if size > MOST_MEMBER:
            raise GuidekitError(f"{name} of {file} is larger than {MOST_MEMBER >> 20} MB")
        with open(file, "rb") as handle:
            handle.seek(offset)
            data = handle.read(size)
        try:
            with open_image(io.BytesIO(data)) as image:
                return as_rgb(upright(image))
        except Exception as error:  # whatever Pillow meets in a damaged file
            raise GuidekitError(f"{name} of {file}: not a readable image ({error})") from None

    return opened


def prompts_of(path: Path) -> dict[str, str]:
    """Prompts by key, as `found_prompts`. Raises GuidekitError where there are none."""
    if found := found_prompts(path):
        return found
    raise GuidekitError(
        f"{path} has no prompts; put a .txt beside each image, or prompts.jsonl with lines "
        '{"key": "0", "prompt": "a cat"}'
    )


def found_prompts(path: Path) -> dict[str, str]:
    """Prompts by key, if any: of a run, of .txt beside images or in tars, or of prompts.jsonl."""
    found: dict[str, str] = {}
    if (path / "run.json").exists() and not (path / "plan.json").exists():
        prompt = read_json(path / "run.json")["sample"].get("prompt")
        return dict.fromkeys(read_images(path).keys, prompt or "")
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else ():
        found[_key(path, file.relative_to(path).as_posix())] = _text(file).strip()
    for tar in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
        found |= _texts(tar)
    if (lines := path / "prompts.jsonl").exists():
        found |= dict(_row(line, lines) for line in _text(lines).splitlines() if line.strip())
    return found


def _text(file: Path) -> str:
    """A file of text. Raises GuidekitError that names it."""
    try:
        return read_text(file)
    except GuidekitError as error:
        raise GuidekitError(f"prompts {file}: {error}") from None


def _row(line: str, file: Path) -> tuple[str, str]:
    """Key and prompt of a line of prompts.jsonl."""
    try:
        row = parse_json(line)
        return key_of(str(row["key"])), str(row["prompt"])
    except (ValueError, LookupError, TypeError):
        raise GuidekitError(
            f'prompts {file}: a line is {{"key": "0", "prompt": "a cat"}}, not {line[:80]!r}'
        ) from None


def _texts(tar: Path) -> dict[str, str]:
    """The .txt of a tar."""
    found = {}
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                if member.isfile() and member.name.endswith(".txt") and member.size < LONGEST:
                    text = opened.extractfile(member).read().decode("utf-8", "replace")
                    found[key_of(member.name)] = text.strip()
    except (tarfile.TarError, OSError) as error:
        raise GuidekitError(f"{tar} is not a readable tar ({error})") from None
    return found
