"""Files that a user drops on the page: masks, layouts, run.json, and images that carry one.

An image that guidekit drew has its settings and masks in its text chunk `guidekit`, so that it
alone restores a run. What is read here was checked as a request's own files are.
"""

import base64
import dataclasses
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guidekit.cli.grid import parse_axes
from guidekit.cli.settings import Settings
from guidekit.errors import GuidekitError
from guidekit.labels import label_sets
from guidekit.layouts import parse_layout
from guidekit.masks import load_mask, resize_mask
from guidekit.serve.asked import ALLOWED
from guidekit.serve.models import PAINTED
from guidekit.serve.options import ServeOptions
from guidekit.serve.request_files import PICTURES, check_layouts, write_files
from guidekit.system.untrusted import MOST_TEXT, open_image, parse_json, read_json

CHUNK = "guidekit"  # text chunk of an image, see `guidekit.images.save_image`
KEPT = ("phrase", "strength", "negative", "prompt", "occurrence", "tokens", "box", "mask")
OPEN_KEYS = ("files", "main", "body", "size")
#: Values that stand where nothing is set.
STANDARD = {field.name: field.default for field in dataclasses.fields(Settings)}
IMAGES = {"image": "image to follow", "map": "label map"}


def opened(request: Any, options: ServeOptions, folder: Path) -> dict[str, Any]:
    """What the page shows of dropped files, written into the new `folder`.

    request: `files` by name in base64 and the name of the `main` one, or the `body` of an earlier
    request; `size` (height, width) of the map to paint on. Raises GuidekitError for anything else.
    """
    if not isinstance(request, dict) or set(request) - set(OPEN_KEYS):
        raise GuidekitError(f"a request to open has the keys {', '.join(OPEN_KEYS)}")
    size = _size(request.get("size"), options)
    body = request.get("body")
    files = (body or {}).get("files", {}) if isinstance(body, dict) else request.get("files", {})
    if not isinstance(files, dict):
        raise GuidekitError("`files` must be an object")
    write_files(files, folder, options.limits)
    if isinstance(body, dict):
        return _run(body, files, folder, size, options)
    main = request.get("main")
    if not isinstance(main, str) or main not in files:
        raise GuidekitError(f"`main` {main!r} is not among the files ({', '.join(files)})")
    path = folder / main
    if path.suffix.lower() not in PICTURES:
        return _document(read_json(path), files, folder, size, options)
    if (tables := _carried(path)) is None:
        return _mask(path, size)
    own = tables.get("files", {}) if isinstance(tables.get("files"), dict) else {}
    beside = folder.with_name("carried")
    write_files(own, beside, options.limits)
    return _run(tables, own, beside, size, options)


def _size(given: Any, options: ServeOptions) -> tuple[int, int]:
    whole = isinstance(given, list) and len(given) == 2 and all(type(side) is int for side in given)
    most = max(options.limits.side, 2 * PAINTED)  # of small images the map is larger
    if not whole or not all(1 <= side <= most for side in given):
        raise GuidekitError(f"`size` is [height, width] of the map, {most} at most each")
    return given[0], given[1]


def _carried(path: Path) -> dict[str, Any] | None:
    """The settings in an image; None for an image of others."""
    with open_image(path) as image:
        image.load()  # a chunk may stand behind the pixels
        text = getattr(image, "text", {}).get(CHUNK)
    if text is None:
        return None
    if len(text) > MOST_TEXT:
        raise GuidekitError("its settings are larger than any that guidekit writes")
    tables = parse_json(text, sent=True)
    return tables if isinstance(tables, dict) else None


def _mask(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """An image as a mask of one layer."""
    mask = load_mask(path)
    return {"kind": "mask", "size": list(size), "map": _bytes([mask], size), "notes": []}


def _document(
    table: Any, files: dict[str, str], folder: Path, size: tuple[int, int], options: ServeOptions
) -> dict[str, Any]:
    """A run.json or a layout.json."""
    if isinstance(table, dict) and ("sample" in table or "segment" in table):
        return _run(table, files, folder, size, options)
    if isinstance(table, dict) and ("segments" in table or "prompt" in table):
        sample = {key: table[key] for key in ("prompt", "negative", "label") if key in table}
        return _layers("layout", sample, {}, table, Place(folder, files, size, options), [])
    raise GuidekitError("it is neither a run.json (`sample`) nor a layout.json (`segments`)")


def _own_name(value: Any, options: ServeOptions) -> Any:
    """The name by which requests know a file of the server; other values as they are."""
    names = {str(path.resolve()): name for name, path in options.files.items()}
    return names.get(value, value) if isinstance(value, str) else value


def _run(
    tables: dict[str, Any],
    files: dict[str, str],
    folder: Path,
    size: tuple[int, int],
    options: ServeOptions,
) -> dict[str, Any]:
    """The tables of a run, as far as this server has what they name; what it has not is noted."""
    kinds = {"sample": dict, "plugin": dict, "segment": list, "control": list}
    for key, kind in kinds.items():
        if not isinstance(tables.get(key) or kind(), kind):
            raise GuidekitError(f"`{key}` must be {'a list' if kind is list else 'an object'}")
    notes: list[str] = []
    sample = _changed(tables.get("sample") or {})
    layout: dict[str, Any] = {"segments": list(tables.get("segment") or [])}
    if (name := _file_of(sample.pop("layout", None), files)) is not None:
        layout = read_json(folder / name)
        if not isinstance(layout, dict):
            raise GuidekitError(f"{name} holds no object")
        sample = {k: layout[k] for k in ("prompt", "negative") if k in layout} | sample
    if sample.get("model", options.models[0]) not in options.models:
        notes.append(f"this server has no model {sample.pop('model')!r}")
    plugin = _plugins(dict(tables.get("plugin") or {}), files, options, notes)
    _keep_images(sample, files, notes)
    _keep_labels(sample, files, options, notes)
    control = _controls(tables.get("control") or [], files, options, notes)
    place = Place(folder, files, size, options)
    found = _layers("run", sample, plugin, layout, place, notes, control)
    return found | {"grid": _grid(tables.get("grid") or [])}


def _changed(sample: dict[str, Any]) -> dict[str, Any]:
    """What a run set beside the defaults, of what a request may set."""
    return {
        key: value
        for key, value in sample.items()
        if key in ALLOWED and value is not None and (key == "model" or value != STANDARD[key])
    }


def _keep_images(sample: dict[str, Any], files: dict[str, str], notes: list[str]) -> None:
    """Keeps the images that are here, by the names of their files; others are noted."""
    for key in [key for key in IMAGES if sample.get(key) is not None]:
        value = sample.pop(key)
        if (own := _file_of(value, files)) is None:
            notes.append(f"the {IMAGES[key]} {Path(str(value)).name} is not here; add it again")
        else:
            sample[key] = own


def _grid(texts: Any) -> list[list[str]]:
    """The axes of a grid as the page has them: the option, and its values as one text."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise GuidekitError("`grid` must be a list of texts such as 'zest.scale=0.5,1,2'")
    return [[axis.name, ", ".join(axis.values)] for axis in parse_axes(texts)]


def _plugins(
    tables: dict[str, Any], files: dict[str, str], options: ServeOptions, notes: list[str]
) -> dict[str, dict[str, Any]]:
    """The plugins that this server has, with the files that their options name by our names."""
    found = {}
    for name, own in tables.items():
        if name.partition(".")[0] not in options.plugins or not isinstance(own, dict):
            notes.append(f"this server has no plugin {name!r}")
            continue
        found[name] = {option: _own_name(value, options) for option, value in own.items()}
        for option, value in found[name].items():
            where = f"{name}.{option}"
            found[name][option] = _images_of(value, where, files, options, notes)
    return found


def _images_of(
    value: Any, where: str, files: dict[str, str], options: ServeOptions, notes: list[str]
) -> Any:
    """An option's value with images by the names of files that are here; others are noted."""
    if isinstance(value, list):
        return [_images_of(item, where, files, options, notes) for item in value]
    if not isinstance(value, str) or Path(value).suffix.lower() not in PICTURES:
        return value
    own = _file_of(value, files)
    if own is None and value not in options.files:
        notes.append(f"{where}: the image {Path(value).name} is not here; add it again")
    return own or value


def _keep_labels(
    sample: dict[str, Any], files: dict[str, str], options: ServeOptions, notes: list[str]
) -> None:
    """Keeps the label set and the affinity by the names that requests know them by."""
    for key in ("labels", "affinity"):
        if key not in sample:
            continue
        value = sample[key] = str(_own_name(sample[key], options))
        there = {*options.files, *((*files, *label_sets()) if key == "labels" else ())}
        if "map" not in sample or value not in there:
            sample.pop(key)
            notes.append(f"{key} {Path(value).name} is not here")


def _controls(
    tables: list[Any], files: dict[str, str], options: ServeOptions, notes: list[str]
) -> list[dict[str, Any]]:
    """The controls that this server has, each with its image; what it has not is noted."""
    names = {str(path.resolve()): name for name, path in options.controls.items()}
    found = []
    for table in tables:
        entry = dict(table) if isinstance(table, dict) else {}
        model, image = str(entry.get("model")), entry.get("image")
        entry["model"] = names.get(model, model)
        if entry["model"] not in options.controls:
            notes.append(f"this server has no control {Path(model).name!r}")
        elif image is not None and (own := _file_of(str(image), files)) is None:
            notes.append(
                f"the image {image} of a control is not here; drop it together with the file"
            )
        else:
            found.append(entry if image is None else entry | {"image": own})
    return found


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layout's files lie, with the size (height, width) of the map to paint on."""

    folder: Path
    files: dict[str, str]
    size: tuple[int, int]
    options: ServeOptions


def _layers(
    kind: str,
    sample: dict[str, Any],
    plugin: dict[str, Any],
    layout: dict[str, Any],
    place: Place,
    notes: list[str],
    control: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A layout as layers: each segment's words, its place, and all of them in one map."""
    entries = _entries(layout.get("segments"), place.files, notes)
    table = {key: layout[key] for key in ("map",) if key in layout} | {"segments": entries}
    check_layouts([(table, place.folder)], place.options.limits)
    segments, size = parse_layout(table, place.folder, "layout").segments, place.size
    if "map" in layout and segments:  # a painted map keeps its own pixels
        with open_image(place.folder / layout["map"]) as image:
            own = (image.height, image.width)
        size = own if max(own) <= max(place.options.limits.side, 2 * PAINTED) else size
    shown = [{key: entry[key] for key in KEPT if key in entry} for entry in entries]
    used = {entry["mask"] for entry in shown if "mask" in entry}
    used |= {sample.get(key) for key in ("image", "map", "labels")}
    used |= {entry.get("image") for entry in control or []}
    used |= {name for own in plugin.values() for value in own.values() for name in _texts(value)}
    return {
        "kind": kind,
        "sample": sample,
        "plugin": plugin,
        "control": control or [],
        "segments": shown,
        "size": list(size),
        "map": _bytes([segment.mask for segment in segments], size),
        "files": {name: text for name, text in place.files.items() if name in used},
        "notes": notes,
    }


def _entries(segments: Any, files: dict[str, str], notes: list[str]) -> list[Any]:
    """The segments of a layout whose masks are here, by the names of their files."""
    if not isinstance(segments, list | None):
        raise GuidekitError("layout: `segments` must be a list")
    entries = []
    for entry in segments or []:
        mask = entry.get("mask") if isinstance(entry, dict) else None
        if mask is None:
            entries.append(entry)
        elif (own := _file_of(mask, files)) is not None:
            entries.append(entry | {"mask": own})
        else:
            notes.append(f"the mask {mask} is not here; drop it together with the file")
    return entries


def _texts(value: Any) -> list[str]:
    """The texts that a value is or holds."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str)]


def _file_of(name: Any, files: dict[str, str]) -> str | None:
    """The file of that name, else one of the same last name."""
    if isinstance(name, str) and name in files:
        return str(name)
    return next((f for f in files if PurePosixPath(f).name == PurePosixPath(str(name)).name), None)


def _bytes(masks: list[Tensor], size: tuple[int, int]) -> str:
    """One number (0 none, 1 the first mask) a pixel, row by row, in base64; later masks win."""
    numbers = np.zeros(size, np.uint8)
    for index, mask in enumerate(masks, 1):
        same = tuple(mask.shape) == size
        inside = mask if same else resize_mask(mask.to(torch.float32), *size)
        numbers[inside.numpy() >= 0.5] = index
    return base64.b64encode(numbers.tobytes()).decode()
