"""Settings of a run. Flag, field, TOML key and run.json key are the same word.

A TOML file has the tables [sample], [plugin.NAME] and [[segment]]; run.json has the same and a
`record` of what happened, so `--config` takes either. Paths in them are relative to the file.
"""

import dataclasses
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guidekit.untrusted import read_json, read_toml

TABLES = ("sample", "plugin", "segment")
NOT_SAMPLE = ("plugin", "segment", "changes", "folder", "replays")
MAX_SEEDS = 100_000
ZOO = Path(__file__).parent / "zoo"


@dataclass(kw_only=True)
class Settings:
    """What `guidekit sample` is told; None leaves the choice to the model."""

    model: str = "scenes"
    prompt: str | None = None
    negative: str | None = None
    label: int | None = None
    layout: Path | None = None
    image: Path | None = None
    image_folder: Path | None = None
    per_image: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    steps: int | None = None
    scheduler: str | None = None
    cfg: float | None = None
    embedded_cfg: float | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    batch: int = 4
    append_phrases: bool = False
    memory: str = "fast"
    attention: str | None = None
    device: str | None = None
    dtype: str | None = None
    nonfinite: str = "raise"
    tries: int = 1
    compare: bool = True
    out: Path | None = None
    plugin: dict[str, dict[str, Any]] = field(default_factory=dict)  # options, in the user's order
    segment: list[Any] = field(default_factory=list)  # texts of --segment, or tables of a file
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # options by --set
    folder: Path = Path()  # what paths in `plugin` and `segment` are relative to
    replays: dict[str, Any] = field(default_factory=dict)  # the record of the run.json followed


def sample_keys() -> dict[str, Any]:
    """Names and types of the keys of the table [sample]."""
    hints = typing.get_type_hints(Settings)
    return {name: kind for name, kind in hints.items() if name not in NOT_SAMPLE}


def make_settings(config: dict[str, Any], flags: dict[str, Any]) -> Settings:
    """Settings from what `read_config` returned and flags; a flag that is not None wins.

    flags: the keys of [sample], and `plugin` (names), `no_plugin` (names), `set` and `segment`
    (texts). Raises ValueError that names what exists.
    """
    kinds = sample_keys()
    sample = dict(config.get("sample", {}))
    for name in kinds:
        if flags.get(name) is not None:
            sample[name] = convert(flags[name], kinds[name], name)
    if flags.get("layout"):  # its texts come with it
        sample |= {name: flags.get(name) for name in ("prompt", "negative")}
    settings = Settings(**sample, folder=config.get("folder", Path()))
    settings.replays = config.get("record", {})
    settings.segment = list(config.get("segment", []))
    if flags.get("segment") or flags.get("layout"):  # a place given by flag replaces the file's
        settings.segment = list(flags.get("segment") or [])
        settings.layout = sample["layout"] if flags.get("layout") else None
    settings.plugin = _plugins(config.get("plugin", {}), flags)
    settings.changes = _changes(settings.plugin, flags.get("set") or ())
    return settings


def _plugins(tables: dict[str, dict], flags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of every plugin of the run, in the order in which they were named."""
    blocked, named = set(flags.get("no_plugin") or ()), list(flags.get("plugin") or ())
    plugins = {name: dict(options) for name, options in tables.items() if name not in blocked}
    for name in named:
        if named.count(name) > 1:
            raise ValueError(f"--plugin {name} is given twice; once is enough")
        plugins.setdefault(name, {})
    return plugins


def _changes(plugins: dict[str, dict], texts: typing.Iterable[str]) -> dict[str, dict[str, Any]]:
    """Options by --set, which must belong to a plugin of the run."""
    changes: dict[str, dict[str, Any]] = {}
    for text in texts:
        plugin, option, value = parse_setting(text)
        if plugin not in plugins:
            raise ValueError(
                f"--set {text}: {plugin!r} is not among the plugins of this run "
                f"({', '.join(plugins) or 'none'}); add --plugin {plugin}"
            )
        changes.setdefault(plugin, {})[option] = value
    return changes


def parse_setting(text: str) -> tuple[str, str, Any]:
    """`zest.scale=2` as ("zest", "scale", 2): the value is TOML, else text."""
    name, equals, raw = text.partition("=")
    plugin, dot, option = name.strip().rpartition(".")
    if not equals or not plugin or not option:
        raise ValueError(f"--set {text}: write PLUGIN.OPTION=VALUE, such as zest.scale=2")
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


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-7`, `0,3,9` or a mix of both as numbers."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or len(seeds) + last - first >= MAX_SEEDS:
            raise ValueError(f"seeds {text!r}: write a range such as 0-7 or a list such as 0,3,9")
        seeds += range(first, last + 1)
    return _check_seeds(seeds)


def _check_seeds(seeds: typing.Sequence[int]) -> tuple[int, ...]:
    """The seeds, which must be different and fit torch's generator."""
    if not seeds:
        raise ValueError("there are no seeds; give a range such as 0-7 or a list such as 0,3,9")
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed occurs twice; every picture needs its own")
    if min(seeds) < 0 or max(seeds) >= 2**63:
        raise ValueError("seeds lie from 0 to 2^63 - 1")
    return tuple(seeds)


def convert(value: Any, kind: Any, where: str, folder: Path = Path()) -> Any:
    """The value as a field's type: bool, int, float, str, Path, lists of them, or None.

    Texts are read as numbers where numbers are needed; a relative Path is taken from `folder`.
    Raises ValueError that begins with `where`.
    """
    if where == "seeds" and isinstance(value, str):
        return parse_seeds(value)
    kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
    if value is None and type(None) in kinds:
        return None
    for one in kinds:
        if one is not type(None):
            try:
                found = _read_as(value, one, where, folder)
            except (TypeError, ValueError, OverflowError):
                continue
            return _check_seeds(found) if where == "seeds" else found
    raise ValueError(f"{where} must be {describe(kind)}, not {value!r}")


def _is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _read_as(value: Any, kind: Any, where: str, folder: Path) -> Any:
    """The value as one plain type; raises TypeError or ValueError if it is none."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return inner[[str(i) for i in inner].index(str(value))]
    if origin in (list, tuple):
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, int | float) and not isinstance(parts, bool):
            parts = [parts]  # a list of one number, which --set gives as the number
        if not isinstance(parts, list | tuple):
            raise TypeError
        return origin(_read_as(part, inner[0], where, folder) for part in parts)
    if kind is bool:
        return {"true": True, "false": False, True: True, False: False}[_bool_key(value)]
    if kind in (int, float):
        return _number(value, kind)
    if isinstance(value, bool | list | dict) or value is None:
        raise TypeError
    return folder / str(value) if kind is Path else str(value)


def _bool_key(value: Any) -> Any:
    if isinstance(value, bool) or value in ("true", "false"):
        return value
    raise TypeError


def _number(value: Any, kind: type) -> int | float:
    """A whole or any number; a fraction or a truth value is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = kind(value)
    if isinstance(value, float) and number != value and value == value:
        raise ValueError
    return number


def describe(kind: Any) -> str:
    """A type in words, for messages and `guidekit plugins show`."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    words |= {Path: "a path", type(None): "nothing"}
    if _is_union(kind):
        return " or ".join(describe(k) for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (list, tuple):
        return f"a list, each {describe(typing.get_args(kind)[0])}"
    return words.get(kind, str(kind))


def read_config(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file or of a run.json, and `folder`, where the file lies.

    Raises ValueError that names the key at fault and those that exist.
    """
    path = Path(path)
    where = f"config {path}"
    tables = _read_tables(path, where)
    known = (*TABLES, "record") if path.suffix == ".json" else TABLES
    _check_table(tables, known, where)
    sample = _read_sample(tables.get("sample", {}), path.parent, f"{where}: [sample]")
    plugin, segment = tables.get("plugin", {}), tables.get("segment", [])
    if not isinstance(plugin, dict) or not all(isinstance(p, dict) for p in plugin.values()):
        raise ValueError(f"{where}: write a table [plugin.NAME] for every plugin")
    if not isinstance(segment, list):
        raise ValueError(f"{where}: write a table [[segment]] for every segment")
    record = tables.get("record", {})
    if not isinstance(record, dict):
        raise ValueError(f"{where}: `record` must be an object")
    found = {"sample": sample, "plugin": plugin, "segment": segment}
    return found | {"folder": path.parent, "record": record}


def _read_tables(path: Path, where: str) -> object:
    """What the file holds."""
    try:
        return read_json(path) if path.suffix == ".json" else read_toml(path)
    except FileNotFoundError:
        raise ValueError(f"{where}: no such file") from None
    except (OSError, ValueError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ValueError(f"{where}: not a readable {kind} file ({error})") from None


def _read_sample(table: object, folder: Path, where: str) -> dict[str, Any]:
    """The table [sample] with every value in its type and every path resolved."""
    kinds = sample_keys()
    _check_table(table, tuple(kinds), where)
    sample = {}
    for name, value in table.items():
        try:
            sample[name] = convert(value, kinds[name], name, folder)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
    own = folder / sample.get("model", "")
    if "model" in sample and own.is_dir() and not (ZOO / sample["model"]).is_dir():
        sample["model"] = str(own)
    return sample


def _check_table(table: object, known: tuple[str, ...], where: str) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table with the keys {', '.join(known)}")
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: no key {key!r}; it has {', '.join(known)}")


def dump(settings: Settings) -> dict[str, Any]:
    """The settings as the tables of run.json; where pictures went is not part of them."""
    sample = {name: getattr(settings, name) for name in sample_keys()}
    del sample["out"], sample["layout"]
    sample |= {k: str(v.resolve()) for k, v in sample.items() if isinstance(v, Path)}
    sample["seeds"] = list(settings.seeds)
    return {"sample": sample, "plugin": settings.plugin, "segment": settings.segment}


def option_kinds(cls: type) -> dict[str, Any]:
    """Names and types of a dataclass's options."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}
