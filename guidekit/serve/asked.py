"""What a request asks for: the tables of run.json, with the files that they name beside them.

A request is data of a stranger. A path in it is a name among its own files, or of what the server
was started with; its model and plugins are those of the server; its numbers are bounded. It is
read as `guidekit sample --config` reads a file, from a folder that holds its files alone.
"""

import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guidekit.cli.controls import read_controls
from guidekit.cli.grid import Axis, Cell, cells_of, parse_axes
from guidekit.cli.plan import checked
from guidekit.cli.settings import FORMAT, TABLES, Settings, make_settings, read_config, sample_keys
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.labels import label_sets
from guidekit.options import code_named, names_paths, option_kinds
from guidekit.references import BUILT_IN
from guidekit.registry import Registry
from guidekit.serve.knobs import as_json, default_of
from guidekit.serve.options import Limits, ServeOptions
from guidekit.serve.request_files import REQUEST, check_layouts, write_files
from guidekit.system.untrusted import read_json
from guidekit.zoo.shipped import ZOO

KEYS = ("format", "sample", "plugin", "segment", "control", "files", "grid", "record")
#: Keys of [sample] that a request may set. Others say what the server reads, where it writes and
#: what it runs on, and so does a key that comes later until it is added here.
ALLOWED = (
    "model",
    "prompt",
    "negative",
    "label",
    "layout",
    "map",
    "labels",
    "affinity",
    "image",
    "seeds",
    "steps",
    "scheduler",
    "cfg",
    "embedded_cfg",
    "eta",
    "height",
    "width",
    "batch",
    "append_phrases",
    "memory",
    "attention",
    "nonfinite",
    "tries",
    "particles",
    "compare",
)
OWN_FILES = ("layout", "image", "map")
NO_AXES = (*OWN_FILES, "labels", "affinity")


@dataclass(frozen=True)
class Asked:
    """A run that a request asks for, checked as far as it can be without the model."""

    settings: Settings
    axes: tuple[Axis, ...]
    #: Its runs: those of a grid, or the one.
    cells: tuple[Cell, ...]
    #: The request itself, from which a page restores everything.
    body: dict[str, Any]
    #: Bytes that keeping it takes.
    size: int


def read_asked(body: Any, options: ServeOptions, registry: Registry, folder: Path) -> Asked:
    """A run out of the JSON of a request; its files are written into the new `folder`.

    Raises GuidekitError, in one line, for what the server does not do.
    """
    kept = _tables(body)
    body = copy.deepcopy(kept)  # the checks write places of the server into these tables
    files = write_files(body["files"], folder, options.limits)
    _check_sample(body["sample"], files, options)
    _check_plugins(body["plugin"], files, options, registry)
    _check_segments(body["segment"], files)
    _check_controls(body["control"], files, options)
    _check_layouts(body, folder, options.limits)
    settings = _settings(body, folder, options)
    _check_numbers(settings, options.limits)
    axes = parse_axes(body["grid"])
    _check_axes(axes)
    _check_cells(axes, options.limits)
    cells = tuple(cells_of(settings, axes)) if axes else (Cell(0, 0, settings),)
    for cell in cells if axes else ():
        _check_numbers(cell.settings, options.limits)
        _check_plugins(cell.settings.changes, files, options, registry, folder)
    read_controls(settings)
    _, condition = checked(settings, registry)
    if condition.map is not None and len(condition.map.labels) > options.limits.classes:
        raise GuidekitError(f"a label map has {options.limits.classes} classes at most here")
    if len(condition.segments) > options.limits.segments:
        raise GuidekitError(f"a layout has {options.limits.segments} segments at most here")
    _check_words(condition, options.limits)
    return Asked(settings, axes, cells, kept, len(json.dumps(kept)))


def _settings(body: dict[str, Any], folder: Path, options: ServeOptions) -> Settings:
    """The settings of checked tables; the model is the server's own, also by a relative name."""
    config = folder / REQUEST
    config.write_text(json.dumps({key: body[key] for key in TABLES} | {"format": FORMAT}))
    return dataclasses.replace(
        make_settings(read_config(config) | {"record": body["record"]}, {}),
        model=body["sample"]["model"],
        device=options.device,
        dtype=options.dtype,
        offered=tuple(path.resolve() for path in options.files.values()),
    )


def _tables(body: Any) -> dict[str, Any]:
    """The tables of a request, each there and of its kind; raises GuidekitError for others."""
    if not isinstance(body, dict):
        raise GuidekitError(f"a request is an object with the keys {', '.join(KEYS)}")
    if unknown := sorted(set(body) - set(KEYS)):
        raise GuidekitError(f"a request has no key {unknown[0]!r}; it has {', '.join(KEYS)}")
    if body.get("format", FORMAT) != FORMAT:
        raise GuidekitError(f"this server reads format {FORMAT}, not {body['format']!r}")
    kinds = {key: list if key in ("segment", "control", "grid") else dict for key in KEYS[1:]}
    tables = {key: body.get(key, kind()) for key, kind in kinds.items()}
    for key, kind in kinds.items():
        if not isinstance(tables[key], kind):
            raise GuidekitError(f"`{key}` must be {'a list' if kind is list else 'an object'}")
    if not all(isinstance(text, str) for text in tables["grid"]):
        raise GuidekitError("`grid` must be a list of texts such as 'zest.scale=0.5,1,2'")
    calls = tables["record"].get("calls")  # all that a run takes over of an account
    tables["record"] = {"calls": calls} if isinstance(calls, dict) else {}
    return {"format": FORMAT} | tables


def _check_sample(sample: dict[str, Any], files: set[str], options: ServeOptions) -> None:
    """Raises GuidekitError for another model, and for paths and devices that are the server's."""
    model = sample.setdefault("model", options.models[0])
    if not _is_among(model, options.models):
        there = ", ".join(options.models)
        raise GuidekitError(f"this server has no model {model!r}; it was started with {there}")
    own = {"device": options.device, "dtype": options.dtype}
    for key in sorted(set(sample_keys()) - set(ALLOWED)):
        if sample.pop(key, None) not in (None, own.get(key)):
            raise GuidekitError(f"{key!r} is the server's own; leave it out")
    for key in OWN_FILES:
        if sample.get(key) is not None and not _is_among(sample[key], files):
            _refuse_path(f"sample.{key}", sample[key], files)
    for key, own_files in (("labels", files | {*label_sets()}), ("affinity", set())):
        if sample.get(key) is not None and not _is_among(sample[key], own_files):
            if not _is_among(sample[key], options.files):
                _refuse_path(f"sample.{key}", sample[key], [*own_files, *options.files])
            sample[key] = str(options.files[sample[key]].resolve())


def _is_among(value: Any, files: Collection[str]) -> bool:
    return isinstance(value, str) and value in files


def _refuse_path(where: str, value: Any, files: set[str] | list[str]) -> None:
    there = ", ".join(sorted(files)) or "none"
    raise GuidekitError(f"{where} {value!r} is not among the files of this request ({there})")


def _check_segments(segments: list[Any], files: set[str]) -> None:
    """Raises GuidekitError for a mask that is no file of the request, and for texts."""
    for index, entry in enumerate(segments):
        if not isinstance(entry, dict):
            raise GuidekitError(f"segment {index} must be an object with `phrase` and a place")
        if "mask" in entry and not _is_among(entry["mask"], files):
            _refuse_path(f"segment {index}: mask", entry["mask"], files)


def _check_layouts(body: dict[str, Any], folder: Path, limits: Limits) -> None:
    """Raises GuidekitError for too much in the layout's file and the request's own segments."""
    layouts = [({"segments": body["segment"]}, folder)]
    if (name := body["sample"].get("layout")) is not None:
        layouts.append((read_json(folder / name), (folder / name).parent))
    check_layouts(layouts, limits)


def _check_controls(controls: list[Any], files: set[str], options: ServeOptions) -> None:
    """Raises GuidekitError for a network that the server has not, and for an image elsewhere."""
    if len(controls) > options.limits.controls:
        raise GuidekitError(f"a run has {options.limits.controls} controls at most here")
    for index, entry in enumerate(controls):
        if not isinstance(entry, dict):
            raise GuidekitError(f"control {index} must be an object with `model`")
        if not _is_among(entry.get("model"), options.controls):
            there = ", ".join(options.controls) or "none; guidekit serve --control FOLDER has some"
            raise GuidekitError(
                f"this server has no control {entry.get('model')!r}; it has {there}"
            )
        if entry.get("image") is not None and not _is_among(entry["image"], files):
            _refuse_path(f"control {index}: image", entry["image"], files)
        entry["model"] = str(options.controls[entry["model"]].resolve())


def _check_plugins(
    tables: dict[str, Any],
    files: set[str],
    options: ServeOptions,
    registry: Registry,
    folder: Path = Path(),
) -> None:
    """Raises GuidekitError for a plugin, and for a file or folder, that the server has not.

    folder: where the request's files lie, for values of a grid. Those are as if from the command
    line, whose paths are taken from the working folder.
    """
    for name, table in tables.items():
        if name.partition(".")[0] not in options.plugins:
            there = ", ".join(options.plugins) or "none"
            raise GuidekitError(f"this server has no plugin {name!r}; it has {there}")
        if not isinstance(table, dict):
            raise GuidekitError(f"plugin {name!r}: its options must be an object")
        cls = registry.guidance_class(name)
        if code := code_named(cls, table):
            option, value = next(iter(code.items()))
            raise GuidekitError(f"{name}.{option}: a request may not name code, such as {value!r}")
        kinds = option_kinds(cls)
        defaults = {f.name: as_json(default_of(f)) for f in dataclasses.fields(cls)}
        for option, value in table.items():
            if option in kinds and names_paths(kinds[option]) and value != defaults[option]:
                table[option] = _placed(f"{name}.{option}", value, files, options, folder)


def _placed(where: str, value: Any, files: set[str], options: ServeOptions, folder: Path) -> Any:
    """A file or folder that a request may name, as the plugin takes it; a list of them as such.

    Those are files of the request, what the server was started with, the built-in models and the
    built-in references. Raises GuidekitError for any other.
    """
    if isinstance(value, list):
        return [_placed(where, one, files, options, folder) for one in value]
    if isinstance(value, str) and "," in value:
        return [_placed(where, one.strip(), files, options, folder) for one in value.split(",")]
    if value is None:
        return value
    if _is_among(value, files):
        return str(folder / value)
    if _is_among(value, options.files):
        return str(options.files[value].resolve())
    if isinstance(value, str) and (BUILT_IN.fullmatch(value) or _is_built_in(value)):
        return value
    return _refuse_path(where, value, [*files, *options.files])


def _is_built_in(name: str) -> bool:
    """Whether it is the name of a built-in model."""
    return re.fullmatch(r"[a-z0-9-]+", name) is not None and (ZOO / name).is_dir()


def _check_numbers(settings: Settings, limits: Limits) -> None:
    """Raises GuidekitError for more than the server draws at once."""
    most = {
        "height": limits.side,
        "width": limits.side,
        "steps": limits.steps,
        "tries": limits.tries,
        "batch": limits.images,
        "particles": limits.images,
    }
    for name, allowed in most.items():
        if (value := getattr(settings, name)) is not None and value > allowed:
            raise GuidekitError(f"{name} is {allowed} at most on this server, not {value}")
    for name in ("prompt", "negative"):
        if len(getattr(settings, name) or "") > limits.text:
            raise GuidekitError(f"{name} has {limits.text} characters at most on this server")
    if len(settings.seeds) > limits.images:
        raise GuidekitError(
            f"a run draws {limits.images} images at most on this server, not {len(settings.seeds)}"
        )


def _check_words(condition: Condition, limits: Limits) -> None:
    """Raises GuidekitError for longer texts than are read, also of a layout's file."""
    own = [(s.phrase, s.prompt, s.negative) for s in condition.segments]
    for text in (condition.prompt, condition.negative, *itertools.chain(*own)):
        if text is not None and len(text) > limits.text:
            raise GuidekitError(f"a prompt or phrase has {limits.text} characters at most here")


def _check_axes(axes: tuple[Axis, ...]) -> None:
    """Raises GuidekitError for a grid over what a request may not set, or over files."""
    for axis in axes:
        if "." not in axis.name and (axis.name in NO_AXES or axis.name not in ALLOWED):
            raise GuidekitError(f"grid: {axis.name!r} is no option to draw a grid over here")


def _check_cells(axes: tuple[Axis, ...], limits: Limits) -> None:
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > limits.cells:
        raise GuidekitError(f"a grid has {limits.cells} cells at most on this server, not {count}")
