"""Texts and values of TOML to the type of a dataclass field."""

import dataclasses
import datetime
import functools
import inspect
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NewType

from guidekit.errors import GuidekitError
from guidekit.seeds import Seeds

# What a text is made of: TOML knows dates, which are meant as written.
TEXTS = str | int | float | Path | datetime.date | datetime.time
#: The type of options that may name code, MODULE:NAME, which is imported: the user's own alone.
ImportPath = NewType("ImportPath", str)


def parse_setting(text: str) -> tuple[str, str, Any]:
    """`zest.scale=2` as ("zest", "scale", 2): the value is TOML, else text."""
    name, equals, raw = text.partition("=")
    plugin, _, option = name.strip().rpartition(".")
    if not equals or not plugin or not option:
        raise GuidekitError(f"--set {text}: write PLUGIN.OPTION=VALUE, such as zest.scale=2")
    return plugin, option, parse_value(raw.strip())


def parse_value(raw: str) -> Any:
    """A TOML value, else the text itself.

    A number or date that is not written as Python would (0.10, 1e-3) stays a text, which
    `convert` reads as what the option needs.
    """
    try:
        value = tomllib.loads(f"value = {raw}")
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return raw
    if list(value) != ["value"]:
        return raw
    value = value["value"]
    return value if isinstance(value, str | bool | list | dict) or str(value) == raw else raw


def convert(value: Any, kind: Any, where: str, folder: Path = Path()) -> Any:
    """The value as a field's type: bool, int, float, str, Path, lists of them, or None.

    Texts are read as numbers where numbers are needed; a relative Path is taken from `folder`.
    Raises GuidekitError that begins with `where`.
    """
    if kind is Seeds:
        return Seeds(value)
    kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
    if value is None and type(None) in kinds:
        return None
    for one in kinds:
        if one is not type(None):
            try:
                return _read_as(value, one, where, folder)
            except (TypeError, ValueError, OverflowError):
                continue
    raise GuidekitError(f"{where} must be {describe(kind)}, not {value!r}")


def _is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _read_as(value: Any, kind: Any, where: str, folder: Path) -> Any:
    """The value as one plain type; raises TypeError or ValueError if it is none."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return inner[[str(i) for i in inner].index(str(value))]
    if origin in (list, tuple):
        parts = _parts(value) if isinstance(value, str) else value
        if isinstance(parts, int | float) and not isinstance(parts, bool):
            parts = [parts]  # a list of one number, which --set gives as the number
        if not isinstance(parts, list | tuple):
            raise TypeError
        return origin(_read_as(part, inner[0], where, folder) for part in parts)
    kind = str if kind is ImportPath else kind
    if kind is bool:
        return {"true": True, "false": False, True: True, False: False}[_bool_key(value)]
    if kind in (int, float):
        return _number(value, kind)
    if kind not in (str, Path):
        return _instance(value, kind)
    if isinstance(value, bool) or not isinstance(value, TEXTS):
        raise TypeError
    if kind is Path:
        return folder / str(value) if str(value) else Path()  # an empty one names nothing
    return str(value)


def _parts(text: str) -> list[str]:
    """The parts of a comma-separated text; none of an empty one."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _instance(value: Any, kind: Any) -> Any:
    """The value itself, for options that only Python can give: an object of the class."""
    if isinstance(kind, type) and not isinstance(value, kind):
        raise TypeError
    return value


def rooted(value: Any, kind: Any, folder: Path) -> Any:
    """The value with relative paths in it taken from `folder`, where the kind is of paths."""
    named = names_paths(kind) and value is not None
    return convert(value, kind, "a path", folder) if named else value


def names_paths(kind: Any) -> bool:
    """Whether values of a type may name files or folders: paths, lists of them, or either."""
    kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
    return any(one is Path or Path in typing.get_args(one) for one in kinds)


def _bool_key(value: Any) -> Any:
    if isinstance(value, bool) or value in ("true", "false"):
        return value
    raise TypeError


def _number(value: Any, kind: type) -> int | float:
    """A whole or any number; a fraction or a truth value is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number: int | float = kind(value)
    if isinstance(value, float) and number != value and value == value:
        raise ValueError
    return number


def describe(kind: Any) -> str:
    """A type in words, for messages and `guidekit plugins show`."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    words |= {
        Path: "a path",
        type(None): "nothing",
        ImportPath: "a name or MODULE:NAME",
        object: "an object, in Python",
    }
    if _is_union(kind):
        return " or ".join(describe(k) for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (list, tuple):
        return f"a list, each {describe(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is Callable:
        return "a function, in Python"
    return words.get(kind, str(kind))


def option_kinds(cls: type) -> dict[str, Any]:
    """Names and types of a dataclass's options; not to be changed, as it is kept."""
    return _kinds(cls)


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def code_named(cls: type, values: dict[str, Any]) -> dict[str, str]:
    """Those of a dataclass's values that are import paths, which reading would run."""
    kinds = option_kinds(cls)
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, str) and ":" in value and _may_name_code(kinds.get(name))
    }


def _may_name_code(kind: Any) -> bool:
    return kind is ImportPath or ImportPath in typing.get_args(kind)


def stated(made: Any) -> dict[str, Any]:
    """The options of a dataclass as JSON has them; paths are absolute, "" where none is given."""
    found = {}
    for field in dataclasses.fields(made):
        if field.init:
            value = getattr(made, field.name)
            found[field.name] = "" if value == field.default == Path() else _stated(value)
    return found


def _stated(value: Any) -> Any:
    """Paths as absolute texts, a function as MODULE:NAME, what states itself by that."""
    if inspect.isfunction(value):
        return f"{value.__module__}:{value.__qualname__}"
    if hasattr(value, "stated"):
        return value.stated
    if isinstance(value, list | tuple):
        return [_stated(item) for item in value]
    return str(value.resolve()) if isinstance(value, Path) else value
