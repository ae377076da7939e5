"""Knobs of a page: the options of plugins, from their fields, types and comments alone."""

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Any

from guidekit.cli.describe import field_comments
from guidekit.cli.plugins import summary
from guidekit.guidance import Guidance
from guidekit.options import describe, option_kinds
from guidekit.registry import Registry, entries

FIRST = ("scale", "start", "stop")  # what every guidance has


def plugin_knobs(registry: Registry, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every guidance of the plugins with its knobs."""
    about = {entry.name: summary(entry.module) for entry in entries()}
    found = []
    for entry in names:
        for name, cls in registry.load(entry).guidances.items():
            found.append(guidance_knobs(name, cls) | {"summary": about.get(entry, "")})
    return found


def guidance_knobs(name: str, cls: type[Guidance]) -> dict[str, Any]:
    """A guidance's name, words and knobs: first those that all have, then its own in order."""
    comments, kinds = field_comments(cls), option_kinds(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    fields.sort(key=lambda field: field.name not in FIRST)
    return {
        "name": name,
        "about": (inspect.getdoc(cls) or "").partition("\n\n")[0],
        "reads_image": cls.reads_image,
        "rejects": cls.overrides("accept"),
        "knobs": [
            {
                "option": field.name,
                "comment": comments.get(field.name, ""),
                "default": as_json(default_of(field)),
                "words": describe(kinds[field.name]),
                "presets": sorted(cls.presets) if field.name == "preset" else [],
                **control(kinds[field.name]),
            }
            for field in fields
        ],
    }


def control(kind: Any) -> dict[str, Any]:
    """The control for a type: its kind, its choices, and whether it is a list or may be empty."""
    kinds = set(typing.get_args(kind)) if is_union(kind) else {kind}
    optional = type(None) in kinds
    kinds -= {type(None)}
    lists = [one for one in kinds if typing.get_origin(one) in (list, tuple)]
    inner = {typing.get_args(one)[0] for one in lists} or kinds
    literals = [one for one in inner if typing.get_origin(one) is typing.Literal]
    choices = typing.get_args(literals[0]) if literals else ()
    return {
        "control": "choice" if choices else _control(inner),
        "choices": list(choices),
        "list": bool(lists),
        "optional": optional,
    }


def _control(kinds: set[Any]) -> str:
    if Path in kinds:
        return "file"
    names = {bool: "switch", int: "whole", float: "number"}
    return next((names[kind] for kind in (bool, float, int) if kind in kinds), "text")


def is_union(kind: Any) -> bool:
    """Whether it stands for one of several types."""
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; None where there is none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def as_json(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, Path):
        return "" if value == Path() else str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
