"""Controls and label maps as people name them on the command line and in files."""

import os
import re
from pathlib import Path
from typing import Any

from guidekit.affinity.matrix import load_affinity
from guidekit.backbones.controls import Control
from guidekit.cli.settings import LABELS, MAP, Settings
from guidekit.errors import GuidekitError
from guidekit.images import as_rgb, save_image
from guidekit.inputs.label_files import read_label_map
from guidekit.labels import LabelMap, LabelSet, load_label_set
from guidekit.system.untrusted import inside
from guidekit.zoo.shipped import ZOO

FORM = "FOLDER=IMAGE.png@SCALE:START-STOP, with :guess at its end for guess mode"
TAIL = re.compile(r"(?:@(?P<scale>[^@:=]*))?(?P<rest>(?::[^:@=/\\]*){0,2})$")
KEYS = ("model", "image", "scale", "start", "stop", "guess")


def parse_control(text: str) -> Control:
    """`FOLDER=map.png@0.8:0-0.5:guess`; without an image it looks at the run's label map.

    Folders and files that exist may hold any of these signs. Raises GuidekitError for a text of
    another form.
    """
    model, image, tail = _parts(text)
    options: dict[str, Any] = {}
    match = TAIL.fullmatch(tail)
    if match is None or not model:
        raise GuidekitError(f"control {text!r}: write {FORM}")
    if match["scale"] is not None:
        options["scale"] = _number(match["scale"], text)
    for part in filter(None, match["rest"].split(":")):
        if part == "guess":
            options["guess"] = True
            continue
        start, dash, stop = part.partition("-")
        if not dash:
            raise GuidekitError(f"control {text!r}: write {FORM}")
        options |= {"start": _number(start, text), "stop": _number(stop, text)}
    return Control(model, image or None, **options)


def _parts(text: str) -> tuple[str, str, str]:
    """Folder, image and what comes after them.

    It is cut where both exist, else at the last = and before the first @ or : of a number.
    """
    cuts = [i for i, sign in enumerate(text) if sign == "="]
    pairs = [(text[:i].strip(), text[i + 1 :].strip()) for i in reversed(cuts)] or [(text, "")]
    for model, rest in pairs:
        for end in range(len(rest), 0, -1):
            if os.path.isfile(rest[:end]) and TAIL.fullmatch(rest[end:]):
                return model, rest[:end], rest[end:]
    model, rest = pairs[0]
    whole = rest if cuts else model
    if not cuts and os.path.exists(whole):
        return whole, "", ""
    tail = re.search(r"@[^@=]*$|(?::(?:guess|[\d.]+-[\d.]+)){1,2}$", whole)
    cut = len(whole) if tail is None else tail.start()
    return (model, rest[:cut], rest[cut:]) if cuts else (whole[:cut].strip(), "", whole[cut:])


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise GuidekitError(f"control {where!r}: {text!r} is no number; write {FORM}") from None


def read_controls(settings: Settings) -> tuple[Control, ...]:
    """The controls of the settings, texts or tables; their networks are not loaded yet.

    Raises GuidekitError that names the key at fault.
    """
    return tuple(
        parse_control(entry) if isinstance(entry, str) else _of_table(entry, settings.folder, i)
        for i, entry in enumerate(settings.control)
    )


def _of_table(entry: Any, folder: Path, index: int) -> Control:
    where = f"control {index}"
    if not isinstance(entry, dict) or "model" not in entry:
        raise GuidekitError(f"{where}: write a table with {', '.join(KEYS)}; `model` must be there")
    for key, value in entry.items():
        kind = {"model": str, "image": str | None, "guess": bool}.get(key, int | float)
        wrong = isinstance(value, bool) and kind is not bool
        if key not in KEYS or wrong or not isinstance(value, kind):
            raise GuidekitError(f"{where}: no such {key!r}: {value!r}; it has {', '.join(KEYS)}")
    own = folder / entry["model"]
    image = entry.get("image")
    given = {k: v for k, v in entry.items() if k not in ("model", "image")}
    return Control(
        str(own) if own.is_dir() else entry["model"],
        None if image is None else inside(folder, image, f"{where}: `image`"),
        **given,
    )


def control_tables(controls: tuple[Control, ...]) -> list[dict[str, Any]]:
    """The tables [[control]] of run.json; images are files of the run's folder."""
    return [
        {
            "model": _name(control.model),
            "image": None if control.image is None else f"controls/{i}.png",
            "scale": control.scale,
            "start": control.start,
            "stop": control.stop,
            "guess": control.guess,
        }
        for i, control in enumerate(controls)
    ]


def _name(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def save_controls(controls: tuple[Control, ...], label_map: LabelMap | None, folder: Path) -> None:
    """Writes the files that `control_tables` names, the label map and its set."""
    for control, table in zip(controls, control_tables(controls), strict=True):
        if control.image is not None:
            save_image(as_rgb(control.image), folder / table["image"])
    if label_map is not None:
        label_map.labels.save(folder / LABELS)
        save_image(label_map.indexed(), folder / MAP)


def control_files(controls: tuple[Control, ...], label_map: LabelMap | None) -> list[str]:
    """Names of the files that `save_controls` writes."""
    names = [table["image"] for table in control_tables(controls) if table["image"] is not None]
    return names + ([] if label_map is None else [MAP, LABELS])


def read_map(settings: Settings) -> LabelMap | None:
    """The label map of the settings, turned by their affinity; None without a map.

    A model or control with a label set beside its weights reads maps of that set. Raises
    GuidekitError for a map without its label set, for one that the run could not keep, and for an
    affinity or a label set without a map.
    """
    if settings.map is None:
        for name in ("affinity", "labels"):
            if (given := getattr(settings, name)) is not None:
                raise GuidekitError(f"{name} {given} is for a label map; give --map MAP.png")
        return None
    affinity = None if settings.affinity is None else load_affinity(settings.affinity)
    target = _own_labels(settings) if affinity is None else affinity.target
    labels = _labels(settings.labels, target)
    found = read_label_map(settings.map, labels)
    found = found if affinity is None else affinity.remap(found)
    found.indexed()  # as run.json keeps it; refused before there is a folder
    return found


def _own_labels(settings: Settings) -> LabelSet | None:
    """The label set in the model's folder, or in a control's; None if there is none."""
    names = [settings.model, *(c.model for c in read_controls(settings) if c.image is None)]
    places = [folder / LABELS for name in names for folder in (ZOO / name, Path(name))]
    found = next((path for path in places if path.is_file()), None)
    return None if found is None else load_label_set(found)


def _labels(name: str | None, target: LabelSet | None) -> LabelSet:
    """The set that the map is in: the one that is named, else the affinity's or a model's."""
    if name is not None:
        return load_label_set(name)
    if target is None:
        raise GuidekitError(
            "--map needs the label set of its numbers or colours: --labels ade20k-150, a JSON "
            "file, or --affinity"
        )
    return target
