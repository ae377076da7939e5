"""Files of others, which may be damaged or hostile: what of them is read, and what is refused.

Every loader of the package reads through here. The rules: nothing of a file is ever run; a name
in a file leads nowhere but into the file's own folder; what it declares is bounded before memory
is taken for it; what is echoed of it is printable. SECURITY.md says the same for users.
"""

import json
import math
import os
import pkgutil
import re
import stat
import tomllib
import types
import typing
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any

from guidekit.errors import GuidekitError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# No PostScript, which is a language, and no format that only starts another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MOST_PIXELS = 89_478_485  # Pillow warns above it: a quarter of a gigabyte at three bytes
MOST_TEXT = 2**26  # bytes of a file of text; the largest vocabularies have a quarter
DEEPEST = 100  # lists and objects in each other; none of guidekit's has ten
MOST_MEMBER = 2**26  # bytes of a member of a tar; more is no image of a web page
MOST_LAYERS = 1000  # that a config may ask for; each takes time before any weight is compared
LONGEST_NAME = 200  # bytes of a folder's name, which file systems end at 255

# Keys that make transformers, diffusers or open_clip import Python that lies in the folder.
CODE_KEYS = {"auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code"}
# Keys of open_clip and timm that name what would be fetched, or read from elsewhere.
FETCH_KEYS = {
    "cache_dir",
    "checkpoint_path",
    "hf_model_name",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
}
FETCHED = re.compile(r"\s*(hf[-_]hub|local-dir)\s*:", re.IGNORECASE)
# What a folder may tell open_clip's tokenizers; all else goes on to from_pretrained.
TOKENIZER_KEYS = {
    "additional_special_tokens",
    "clean",
    "language",
    "reduction_mask",
    "strip_sep_token",
}
# Where the parts of a pipeline may come from; anything else would be imported by its name.
LIBRARIES = {"diffusers", "transformers"}
OWN_LIBRARY = "guidekit."
BIDI = set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # reorder a line


# Texts and names


def printable(text: object) -> str:
    r"""The text with what would steer a terminal written as \x1b and the like.

    Those are control characters but for line breaks and tabs, marks that reorder a line, and
    halves of characters that no encoding writes.
    """
    return "".join(c if _is_harmless(c) else ascii(c)[1:-1] for c in str(text))


def _is_harmless(character: str) -> bool:
    if character in "\n\t":
        return True
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") and character not in BIDI


def file_name(name: object, what: str) -> str:
    """The name, which becomes a file or folder of its own. Raises GuidekitError for a path.

    Both kinds of slash count everywhere, so that a file means the same on every system.
    """
    plain = isinstance(name, str) and PurePosixPath(name).name == PureWindowsPath(name).name == name
    if not plain or name in ("", ".", "..") or printable(name) != name:
        raise GuidekitError(f"{what} must be a folder's name, not {name!r}")
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise GuidekitError(f"{what} must be a folder's name of {LONGEST_NAME} bytes at most")
    return name


def inside(folder: Path, name: object, what: str) -> Path:
    """The path `folder / name`. Raises GuidekitError for a name that leads out of the folder."""
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else [".."]
    out = ".." in parts or not parts[0] or bool(PureWindowsPath(str(name)).drive)
    if out or "\0" in name:
        raise GuidekitError(
            f"{what} {name!r} leads out of {folder}; name a file there, or one below it"
        )
    return folder / name


# Text, JSON, TOML


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """A file of UTF-8, with or without a mark in front.

    Raises FileNotFoundError, another OSError, and GuidekitError for a file of more than `most`
    bytes, of another encoding, or that is no file: a pipe would be waited for.
    """
    _require_file(path)
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise GuidekitError(f"it is larger than {most >> 20} MB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GuidekitError(f"it is no text in UTF-8 ({error.reason})") from None


def _require_file(path: Path) -> None:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise GuidekitError("it is a folder" if stat.S_ISDIR(mode) else "it is no file")


def parse_json(text: str | bytes, sent: bool = False) -> Any:
    """What a JSON text holds. Raises GuidekitError, also for one that is too deeply nested.

    sent: what can be sent again as JSON in UTF-8. That is without NaN and infinities, which JSON
    has not and Python reads, and without halves of characters, which no encoding writes.
    """
    own: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite} if sent else {}
    try:
        found = json.loads(text, **own)
    except RecursionError:
        raise GuidekitError("it is too deeply nested") from None
    except ValueError as error:
        raise GuidekitError(str(error)) from None
    if _depth(found) > DEEPEST:  # less than what a copy of it can follow
        raise GuidekitError("it is too deeply nested")
    if sent:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise GuidekitError("a text in it holds half of a character") from None
    return found


def _depth(value: Any) -> int:
    """How deeply lists and objects lie in each other, counted up to DEEPEST + 1."""
    level, depth = [value], 0
    while depth <= DEEPEST:
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            break
        level = [v for own in level for v in (own.values() if isinstance(own, dict) else own)]
        depth += 1
    return depth


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return number


def read_json(path: Path, sent: bool = False) -> Any:
    """What a JSON file holds; raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path), sent)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises OSError, and GuidekitError with the file's name."""
    try:
        table = read_json(path)
    except GuidekitError as error:
        raise GuidekitError(
            f"{path} is not readable JSON ({error}); download or write it again"
        ) from None
    if not isinstance(table, dict):
        raise GuidekitError(f"{path} holds no JSON object; download or write it again")
    return table


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; raises as `read_text`, and GuidekitError for other texts."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise GuidekitError("it is too deeply nested") from None
    except ValueError as error:
        raise GuidekitError(str(error)) from None


def read_fields(cls: type, table: object, where: str) -> dict[str, Any]:
    """The fields of a dataclass from a JSON object; lists become tuples, nothing is converted.

    Raises GuidekitError that begins with `where`: a key too many or too few, another type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}
    if not isinstance(table, dict) or set(table) - set(known):
        raise GuidekitError(f"{where} must be an object with the keys {', '.join(known)}")
    for name, field in known.items():
        optional = (field.default, field.default_factory) != (MISSING, MISSING)
        if name not in table and not optional:
            raise GuidekitError(f"{where} lacks the key {name!r}")
        if name in table and not _is_a(table[name], hints[name]):
            raise GuidekitError(f"{where} has a wrong value of {name!r}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a field's type; a number that is whole is also a float."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        return any(_is_a(value, one) for one in inner)
    if origin is tuple:
        same = len(inner) == 2 and inner[1] is ...
        count_fits = isinstance(value, list) and (same or len(value) == len(inner))
        return count_fits and all(
            _is_a(v, inner[0] if same else k)
            for v, k in zip(value, [inner[0]] * len(value) if same else inner, strict=True)
        )
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    plain = kind if isinstance(kind, type) else origin
    return isinstance(value, plain)


# Configs of models


def check_config(config: object, where: str) -> None:
    """Raises GuidekitError for a config that asks for code, for a download or for endless layers.

    where: what the message begins with, such as the file.
    """
    for key, value in _entries(config):
        if key in CODE_KEYS and value:
            raise GuidekitError(
                f"{where} asks for Python of its own folder ({key!r}), which is never run; take "
                "the model from somebody who publishes it without, or remove the key"
            )
        if isinstance(value, str) and FETCHED.match(value):
            raise _fetches(where, key, value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and "layers" in key and value > MOST_LAYERS:
            raise GuidekitError(f"{where}: {key!r} is {value}; {MOST_LAYERS} at most are read")


def _fetches(where: str, key: str, value: object) -> GuidekitError:
    return GuidekitError(
        f"{where} names something to fetch ({key!r}: {str(value)[:80]!r}), which is not done for a "
        "folder; name the model yourself, or take a folder that is whole"
    )


def check_encoder(config: object, where: str) -> None:
    """As `check_config`, for what timm and open_clip build; raises for FETCH_KEYS too."""
    check_config(config, where)
    for key, value in _entries(config):
        if key in FETCH_KEYS and value:
            raise _fetches(where, key, value)


def _entries(config: object, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth; an entry of a list has the list's key."""
    if key:
        yield key, config
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _entries(value, str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _entries(value, key)


def check_configs(folder: Path) -> None:
    """Raises GuidekitError if a config in a model's folder, or in a part of it, is refused."""
    parts = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    for part in (folder, *parts):
        for path in sorted(part.iterdir()):
            name = path.name.lower()  # some file systems find CONFIG.JSON as config.json
            if name.endswith("config.json") or name == "model_index.json":
                check_config(_config(path), str(path))


def _config(path: Path) -> Any:
    """What a config holds; one that cannot be read is left to its loader, which says what to do."""
    try:
        return read_json(path)
    except (OSError, GuidekitError):
        return None


def check_pipeline(folder: Path) -> None:
    """Raises GuidekitError for a pipeline's folder with code or parts from anywhere else."""
    check_configs(folder)
    index = folder / "model_index.json"
    for part, kind in (read_object(index) if index.exists() else {}).items():
        if not isinstance(kind, list):
            continue
        file_name(part, f"{index}: a part")
        library = kind[0] if len(kind) == 2 else ""
        own = isinstance(library, str) and library.startswith(OWN_LIBRARY)
        if part == "_class_name" or not (own or library is None or library in _libraries()):
            raise GuidekitError(
                f"{index} takes {part!r} from {kind!r}; parts come from diffusers or transformers, "
                "and no code of a folder is run"
            )


def _libraries() -> set[str]:
    """The libraries of parts, and diffusers' own modules, which pipelines name without it."""
    from diffusers import pipelines

    return LIBRARIES | {module.name for module in pkgutil.iter_modules(pipelines.__path__)}


def check_clip(config: object, where: str) -> None:
    """Raises GuidekitError for what open_clip is not told by a folder's `open_clip_config.json`."""
    check_encoder(config, where)
    model = config.get("model_cfg") if isinstance(config, dict) else None
    towers = [model.get(k) for k in ("vision_cfg", "text_cfg")] if isinstance(model, dict) else []
    if not towers or not all(isinstance(tower, dict) for tower in towers):
        raise GuidekitError(f"{where} lacks model_cfg with vision_cfg and text_cfg")
    told = towers[1].get("tokenizer_kwargs") or {}
    more = sorted(set(told) - TOKENIZER_KEYS) if isinstance(told, dict) else ["a list"]
    if more:
        raise GuidekitError(
            f"{where}: tokenizer_kwargs may not hold {', '.join(map(str, more))}; there are "
            f"{', '.join(sorted(TOKENIZER_KEYS))}"
        )


# Images and weights


def open_image(source: str | Path | IO[bytes]) -> "Image":
    """An image that is open but not decoded yet, of one of FORMATS and of at most MOST_PIXELS.

    Raises FileNotFoundError, GuidekitError, and what else Pillow raises for damaged files.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, str | Path):
        _require_file(Path(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:
        raise GuidekitError(f"it is none of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise GuidekitError(_TOO_LARGE) from None
    if image.width * image.height > MOST_PIXELS:  # somebody may have changed Pillow's own limit
        image.close()
        raise GuidekitError(_TOO_LARGE)
    return image


_TOO_LARGE = f"it has more than {MOST_PIXELS // 10**6} million pixels; make it smaller"


def read_weights(path: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file; GuidekitError that names it if it is damaged."""
    from safetensors.torch import load_file

    check_weights(path)
    return load_file(path)


def check_weights(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file whose header fits its length.

    Raises GuidekitError that names the file if it does not, or is no file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        _require_file(path)
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, GuidekitError) as error:
        raise GuidekitError(f"{path} is damaged ({error}); download or write it again") from None
