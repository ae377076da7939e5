"""Settings of a run. Flag, field, TOML key and run.json key are the same word.

A TOML file has the tables [sample], [plugin.NAME], [[segment]] and [[control]]; run.json has the
same, a `format` and a `record` of what happened, so `--config` takes either. Paths in them are
relative to the file.
"""

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guidekit.errors import GuidekitError, nearest
from guidekit.options import convert, parse_setting
from guidekit.seeds import Seeds
from guidekit.system.untrusted import read_json, read_toml
from guidekit.zoo.shipped import DEFAULT, ZOO

TABLES = ("sample", "plugin", "segment", "control")
MAP, LABELS = "map.png", "labels.json"  # a run's label map and its set, in its folder
FORMAT = 1  # of run.json; another number is one that this version cannot read
NOT_SAMPLE = ("plugin", "segment", "control", "changes", "folder", "replays", "offered")


@dataclass(kw_only=True, frozen=True)
class Settings:
    """What `guidekit sample` is told; None leaves the choice to the model."""

    model: str = DEFAULT
    prompt: str | None = None
    negative: str | None = None
    label: int | None = None
    layout: Path | None = None
    map: Path | None = None
    labels: str | None = None
    affinity: Path | None = None
    image: Path | None = None
    image_folder: Path | None = None
    per_image: int | None = None
    seeds: Seeds = Seeds(range(4))
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
    compile: str | None = None
    device: str | None = None
    dtype: str | None = None
    nonfinite: str = "raise"
    tries: int = 1
    particles: int = 1
    compare: bool = True
    out: Path | None = None
    plugin: dict[str, dict[str, Any]] = field(default_factory=dict)  # options, in the user's order
    segment: list[Any] = field(default_factory=list)  # texts of --segment, or tables of a file
    control: list[Any] = field(default_factory=list)  # texts of --control, or tables of a file
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # options by --set
    folder: Path = Path()  # what paths in `plugin` and `segment` are relative to
    replays: dict[str, Any] = field(default_factory=dict)  # the record of the run.json followed
    offered: tuple[Path, ...] = ()  # files that runs name by their paths and do not copy


def sample_keys() -> dict[str, Any]:
    """Names and types of the keys of the table [sample]."""
    hints = typing.get_type_hints(Settings)
    return {name: kind for name, kind in hints.items() if name not in NOT_SAMPLE}


def make_settings(config: dict[str, Any], flags: dict[str, Any]) -> Settings:
    """Settings from what `read_config` returned and flags; a flag that is not None wins.

    flags: the keys of [sample], and `plugin` (names), `no_plugin` (names), `set`, `segment`
    and `control` (texts). Raises GuidekitError that names what exists.
    """
    plugin = _plugins(config.get("plugin", {}), flags)
    return Settings(
        **_sample(config.get("sample", {}), flags),
        plugin=plugin,
        segment=_segments(config.get("segment", []), flags),
        control=list(flags.get("control") or config.get("control", [])),
        changes=_changes(plugin, flags.get("set") or ()),
        folder=config.get("folder", Path()),
        replays=config.get("record", {}),
    )


def _sample(table: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The keys of [sample]: those of a file, and the flags, which win."""
    sample = dict(table)
    for name, kind in sample_keys().items():
        if flags.get(name) is not None:
            sample[name] = convert(flags[name], kind, name)
    if flags.get("layout"):  # its texts come with it
        sample |= {name: flags.get(name) for name in ("prompt", "negative")}
    elif flags.get("segment"):  # a place given by flag replaces the file's
        sample["layout"] = None
    return sample


def _segments(tables: list[Any], flags: dict[str, Any]) -> list[Any]:
    """The segments of a file, or those by flag in their place."""
    if flags.get("segment") or flags.get("layout"):
        return list(flags.get("segment") or [])
    return list(tables)


def _plugins(tables: dict[str, dict], flags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of every plugin of the run, in the order in which they were named."""
    blocked, named = set(flags.get("no_plugin") or ()), list(flags.get("plugin") or ())
    plugins = {name: dict(options) for name, options in tables.items() if name not in blocked}
    for name in named:
        if named.count(name) > 1:
            raise GuidekitError(f"--plugin {name} is given twice; once is enough")
        plugins.setdefault(name, {})
    return plugins


def _changes(plugins: dict[str, dict], texts: typing.Iterable[str]) -> dict[str, dict[str, Any]]:
    """Options by --set, which must belong to a plugin of the run."""
    changes: dict[str, dict[str, Any]] = {}
    for text in texts:
        plugin, option, value = parse_setting(text)
        if plugin not in plugins:
            raise not_among(f"--set {text}", plugin, plugins)
        changes.setdefault(plugin, {})[option] = value
    return changes


def not_among(flag: str, plugin: str, plugins: typing.Iterable[str]) -> GuidekitError:
    """The refusal of an option of a plugin that the run does not have."""
    there, hint = ", ".join(plugins) or "none", nearest(plugin, list(plugins))
    return GuidekitError(
        f"{flag}: {plugin!r} is not among the plugins of this run ({there}){hint}"
        + ("" if hint else f"; add --plugin {plugin}")
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file or of a run.json, and `folder`, where the file lies.

    Raises GuidekitError that names the key at fault and those that exist.
    """
    path = Path(path)
    where = f"config {path}"
    tables = _read_tables(path, where)
    known = (*TABLES, "format", "record") if path.suffix == ".json" else TABLES
    return parse_config(tables, path.parent, where, known)


def parse_config(
    tables: object, folder: Path, where: str, known: tuple[str, ...] = TABLES
) -> dict[str, Any]:
    """What `read_config` returns of the tables of a file in `folder`; raises as it does."""
    _check_table(tables, known, where)
    if tables.get("format", FORMAT) != FORMAT:
        raise GuidekitError(
            f"{where}: this guidekit reads format {FORMAT}, not {tables['format']!r}; use the "
            "version that wrote it"
        )
    sample = _read_sample(tables.get("sample", {}), folder, f"{where}: [sample]")
    plugin, segment = tables.get("plugin", {}), tables.get("segment", [])
    if not isinstance(plugin, dict) or not all(isinstance(p, dict) for p in plugin.values()):
        raise GuidekitError(f"{where}: write a table [plugin.NAME] for every plugin")
    control = tables.get("control", [])
    for name, value in (("segment", segment), ("control", control)):
        if not isinstance(value, list):
            raise GuidekitError(f"{where}: write a table [[{name}]] for every {name}")
    record = tables.get("record", {})
    if not isinstance(record, dict):
        raise GuidekitError(f"{where}: `record` must be an object")
    found = {"sample": sample, "plugin": plugin, "segment": segment, "control": control}
    return found | {"folder": folder, "record": record}


def _read_tables(path: Path, where: str) -> object:
    """What the file holds."""
    try:
        return read_json(path) if path.suffix == ".json" else read_toml(path)
    except FileNotFoundError:
        raise GuidekitError(f"{where}: no such file") from None
    except (OSError, ValueError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise GuidekitError(f"{where}: not a readable {kind} file ({error})") from None


def _read_sample(table: object, folder: Path, where: str) -> dict[str, Any]:
    """The table [sample] with every value in its type and every path resolved."""
    kinds = sample_keys()
    _check_table(table, tuple(kinds), where)
    sample = {}
    for name, value in table.items():
        try:
            sample[name] = convert(value, kinds[name], name, folder)
        except ValueError as error:
            raise GuidekitError(f"{where} {error}") from None
    if sample.get("labels") and (folder / sample["labels"]).is_file():
        sample["labels"] = str(folder / sample["labels"])
    own = folder / sample.get("model", "")
    if "model" in sample and own.is_dir() and not (ZOO / sample["model"]).is_dir():
        sample["model"] = str(own)
    return sample


def _check_table(table: object, known: tuple[str, ...], where: str) -> None:
    if not isinstance(table, dict):
        raise GuidekitError(f"{where}: expected a table with the keys {', '.join(known)}")
    for key in table:
        if key not in known:
            raise GuidekitError(f"{where}: no key {key!r}; it has {', '.join(known)}")


def dump(settings: Settings) -> dict[str, Any]:
    """The settings as the tables of run.json; where images went is not part of them."""
    sample = {name: getattr(settings, name) for name in sample_keys()}
    del sample["out"], sample["layout"]
    sample |= {k: str(v.resolve()) for k, v in sample.items() if isinstance(v, Path)}
    if settings.map is not None:  # copies in the run's folder, as the controls saw them
        sample |= {"map": MAP, "labels": LABELS, "affinity": None}
    sample["seeds"] = list(settings.seeds)
    own = {"plugin": settings.plugin, "segment": settings.segment, "control": settings.control}
    return {"sample": sample, **own}
