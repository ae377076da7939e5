"""`guidekit affinity`. Everything that needs torch is imported inside."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.terminal import say
from guidekit.errors import GuidekitError

KINDS = ("segmentation", "features", "text")
MODELS = ("segmenter", "feature_model", "text_model")  # the options that name theirs
VOTE = "vote"
FLAGS = {"segmentation": "--segmenter", "features": "--features", "text": "--text"}
NAMED = 12  # classes that a warning names
#: The estimate that reads an option.
READ_BY = {
    "segmenter": "segmentation",
    "text_model": "text",
    "template": "text",
    "feature_model": "features",
    "site": "features",
    "timestep": "features",
    "source_shots": "features",
}


@click.command()
@click.argument("shots", metavar="SHOTS", type=click.Path(path_type=Path))
@click.option(
    "--source", help="What to map to: a label set by name or JSON, or a model that has one."
)
@click.option("--target", help="Label set of the shots' masks [SHOTS/classes.json].")
@click.option("--by", help="segmentation,features,text; vote is all with a model [vote].")
@click.option("--segmenter", help="Built-in judge, or a folder or hub id of transformers.")
@click.option("--text", "text_model", help="Encoder of names: a CLIP, a folder, or a model.")
@click.option("--features", "feature_model", help="A model whose features count, or timm/NAME.")
@click.option("--site", default="", help="Block of the features [the decoder's middle one].")
@click.option("--timestep", type=click.IntRange(0), default=100, show_default=True)
@click.option(
    "--source-shots",
    type=click.Path(path_type=Path),
    help="Images labelled with source classes, which features are compared with.",
)
@click.option("--template", default="{}", show_default=True, help="What is said of a name.")
@click.option(
    "--first",
    type=click.Choice(KINDS),
    help="The estimate that decides where no two agree [segmentation].",
)
@click.option("--hand", type=click.Path(path_type=Path), help="JSON of target to source names.")
@click.option("--any-kind", is_flag=True, help="Let things stand for stuff and stuff for things.")
@click.option("--apply", "maps", type=click.Path(path_type=Path), help="Label maps to rewrite.")
@click.option("--coloured", is_flag=True, help="Rewrite them in the source's colours.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--device", default=None, help="cpu, cuda, cuda:1 [cuda if there is one].")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
@click.pass_context
def affinity(
    ctx: click.Context, shots: Path, out: Path, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Say which classes of a source label set stand for those of a few labelled images.

    SHOTS holds images/ and masks/ by stem and classes.json, their label set. With --apply it may be
    the folder of an affinity that was made before; every label map of the folder is then rewritten
    in the source's classes, for programs that know no others.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GuidekitError(f"{out} exists; choose another --out")
    from guidekit.affinity import load_affinity

    made, maps = (shots / "affinity.json").is_file(), options["maps"]
    if made and maps is None:
        raise GuidekitError(f"{shots} is an affinity; give --apply with a folder of label maps")
    _check_read(ctx, made, options)
    files = [] if maps is None else _map_files(maps)
    found = load_affinity(shots) if made else _estimated(shots, files, options)
    for file in files:  # all can be rewritten before anything is written
        _rewritten(found, file, options["coloured"])
    if not made:
        _save(found, out)
    written = _write_maps(found, files, out if made else out / "maps", options["coloured"])
    if as_json:
        click.echo(json.dumps({"folder": str(out), "maps": written, **found.table()}))
    elif not quiet:
        say(_told(found, out, written))


def _check_read(ctx: click.Context, made: bool, options: dict[str, Any]) -> None:
    """Raises GuidekitError for an option that was given and that nothing would read."""
    kinds = [] if made else _kinds(options)
    given = [
        param
        for param in ctx.command.params
        if param.name in options
        and ctx.get_parameter_source(param.name) != click.core.ParameterSource.DEFAULT
    ]
    for param in given:
        flag, name = param.opts[0], param.name
        if made and name not in ("maps", "coloured", "device"):
            raise GuidekitError(
                f"{flag} is for an estimate, and the affinity is estimated already; leave it out, "
                "or give the folder of the shots"
            )
        if not made:
            _check_asked(flag, READ_BY.get(str(name)), kinds, options["by"])
        if name == "coloured" and options["maps"] is None:
            raise GuidekitError("--coloured is for label maps that are rewritten; give --apply")
    if not made:
        _check_first(options["first"], kinds, options["by"])


def _check_asked(flag: str, kind: str | None, kinds: list[str], by: str | None) -> None:
    """Raises GuidekitError for an option of an estimate that is not asked for."""
    if kind is not None and kind not in kinds:
        raise GuidekitError(
            f"{flag} is of the estimate by {kind}, which is not asked for; {_asking(kind, by)}, or "
            "leave it out"
        )


def _check_first(first: str | None, kinds: list[str], by: str | None) -> None:
    """Raises GuidekitError for a first estimate that is not asked for, or that is the only one."""
    if first is not None and first not in kinds:
        raise GuidekitError(
            f"--first {first} names an estimate that is not asked for; {_asking(first, by)}, or "
            "leave --first out"
        )
    if first is not None and len(kinds) < 2:
        raise GuidekitError(
            f"--first {first} decides between estimates, and there is one; ask for more, or leave "
            "it out"
        )


def _asking(kind: str, by: str | None) -> str:
    """How an estimate is asked for, where --by is this."""
    asks_all = by is None or VOTE in _named(by)
    return f"give {FLAGS[kind]}" if asks_all else f"add {kind} to --by"


def _estimated(shots: Path, files: list[Path], options: dict[str, Any]) -> Any:
    """The affinity of the shots, by all that was named; the label maps are of their classes."""
    from guidekit.affinity import estimate, read_shots
    from guidekit.affinity.encoders import load_features, load_texts
    from guidekit.affinity.matrix import ORDER, parse_hand
    from guidekit.inputs.label_files import read_label_map
    from guidekit.system.untrusted import read_object

    kinds = _kinds(options)
    own = read_shots(shots, options["target"])
    for file in files:  # the models that are asked take long
        read_label_map(file, own.labels)
    source, segmenter = _source(options, "segmentation" in kinds)
    hand = options["hand"]
    table = {} if hand is None else read_object(hand)
    load = _loader(options["device"])
    theirs = options["source_shots"]
    place = {"site": options["site"], "timestep": options["timestep"]}
    first = [] if options["first"] is None else [options["first"]]
    features = options["feature_model"] if "features" in kinds else None
    return estimate(
        own,
        source,
        segmenter=segmenter,
        texts=load_texts(options["text_model"], load) if "text" in kinds else None,
        features=None if features is None else load_features(features, load, **place),
        source_shots=() if theirs is None else read_shots(theirs, source),
        template=options["template"],
        by_hand=parse_hand(table, source, own.labels, f"--hand {hand}"),
        order=tuple(dict.fromkeys((*first, *ORDER))),
        by_kind=not options["any_kind"],
    )


def _kinds(options: dict[str, Any]) -> list[str]:
    """The estimates that are asked for. Raises GuidekitError for one without its model."""
    models = {
        "segmentation": options["segmenter"] or options["source"],
        "features": options["feature_model"],
        "text": options["text_model"],
    }
    given = [k for k, o in zip(KINDS, MODELS, strict=True) if options[o] is not None]
    if options["by"] is None:
        return given
    named = _named(options["by"]) or [""]
    if unknown := [name for name in named if name not in (*KINDS, VOTE)]:
        there = ", ".join((*KINDS, VOTE))
        raise GuidekitError(f"--by {options['by']}: no estimate {unknown[0]!r}; there are {there}")
    for kind in named:
        if kind != VOTE and models[kind] is None:
            raise GuidekitError(f"--by {kind} needs {FLAGS[kind]}, the model that it asks")
    return [kind for kind in KINDS if kind in named or (VOTE in named and kind in given)]


def _named(by: str) -> list[str]:
    """The estimates that --by names."""
    return [word.strip() for word in by.split(",") if word.strip()]


def _source(options: dict[str, Any], segments: bool) -> tuple[Any, Any]:
    """The label set to map to, and the segmenter if one is asked for.

    Raises GuidekitError for a model that says nothing of its classes.
    """
    from guidekit.affinity.segmenters import load_segmenter
    from guidekit.labels import LABELS, label_sets, load_label_set

    name, device = options["source"], options["device"]
    segmenter = options["segmenter"]
    if segments and segmenter is None and _names_no_segmenter(name):
        raise GuidekitError(
            f"--source {name} is a label set, and no segmenter; give one of its classes with "
            "--segmenter"
        )
    network = load_segmenter(segmenter or name, device) if segments else None
    if name is None:
        if network is None:
            raise GuidekitError(
                f"--source says what to map to: one of {', '.join(label_sets())}, a JSON file, or "
                "a segmenter"
            )
        return network.labels, network
    if name in label_sets() or Path(name).is_file():
        labels = load_label_set(name)
    elif beside := _labels_beside(name):
        labels = load_label_set(beside)
    elif _is_control(Path(name)):
        raise GuidekitError(
            f"{name} does not say which classes its maps hold; name their label set "
            f"({', '.join(label_sets())}), or put it beside the weights as {LABELS}"
        )
    else:
        labels = (network or load_segmenter(name, device)).labels
    return _matched(labels, network)


def _names_no_segmenter(name: str | None) -> bool:
    """Whether a name is that of a label set, or of a model that draws maps."""
    from guidekit.labels import label_sets

    return name is not None and (name in label_sets() or Path(name).is_file() or _draws_maps(name))


def _labels_beside(name: str) -> Path | None:
    """The label set beside the weights of a built-in model or of a folder; None without one."""
    from guidekit.labels import LABELS
    from guidekit.zoo.shipped import ZOO

    places = (ZOO / name / LABELS, Path(name) / LABELS)
    return next((place for place in places if place.is_file()), None)


def _draws_maps(name: str) -> bool:
    """Whether a model with a label set beside it follows maps, as no segmenter does."""
    beside = _labels_beside(name)
    if beside is None:
        return False
    return (beside.parent / "model_index.json").is_file() or _is_control(beside.parent)


def _is_control(folder: Path) -> bool:
    from guidekit.system.untrusted import read_object

    config = folder / "config.json"
    return config.is_file() and read_object(config).get("_class_name") in (
        "ControlNetModel",
        "T2IAdapter",
        "MapEncoder",
    )


def _matched(labels: Any, network: Any) -> tuple[Any, Any]:
    """The set and a segmenter whose classes are the set's, by name where they differ in order.

    A segmenter's names count without what stands after a comma or semicolon. Raises GuidekitError
    for a segmenter that has none of them.
    """
    if network is None or network.labels.classes == labels.classes:
        return labels, network
    import torch

    from guidekit.affinity.segmenters import Segmenter
    from guidekit.labels import listed

    known = {_plain(name): i for i, name in enumerate(labels.classes)}
    place = [known.get(_plain(name)) for name in network.labels.classes]
    if not any(own is not None for own in place):
        if len(network.labels) != len(labels):
            raise GuidekitError(
                f"the segmenter knows none of the classes of {labels.name!r} by name; give one "
                "that was trained on them"
            )
        place = [*range(len(labels))]
    pairs = [(own, i) for i, own in enumerate(place) if own is not None]
    if lacking := set(range(len(labels))) - {own for own, _ in pairs}:
        names = listed((labels.classes[i] for i in sorted(lacking)), NAMED)
        warnings.warn(
            f"the segmenter knows {len(labels) - len(lacking)} of the {len(labels)} classes of "
            f"{labels.name!r} by name, and never names the others: {names}",
            stacklevel=2,
        )
    places, rows = (torch.tensor(side) for side in zip(*pairs, strict=True))

    def see(pixels: Any) -> Any:
        shares = network(pixels)[rows]
        return shares.new_zeros(len(labels), *shares.shape[1:]).index_add_(0, places, shares)

    return labels, Segmenter(labels, see)


def _plain(name: str) -> str:
    return name.replace(";", ",").partition(",")[0].strip().lower()


def _loader(device: str | None) -> Any:
    """Loads a model by the names that `--model` takes."""
    from guidekit.cli.models import load_model
    from guidekit.registry import Registry

    return lambda name: load_model(name, Registry(), device)


def _save(found: Any, out: Path) -> None:
    """The affinity's files, and the image of its matrix."""
    from guidekit.affinity.report import matrix_image
    from guidekit.images import save_image

    found.save(out)
    save_image(matrix_image(found), out / "affinity.png")


def _map_files(maps: Path) -> list[Path]:
    """The label maps of a folder. Raises GuidekitError for one without any, and for equal names."""
    from guidekit.heads.data import image_files

    files = image_files(maps) if maps.is_dir() else []
    if not files:
        raise GuidekitError(f"{maps} has no label maps; give a folder of PNG files")
    twice = [stem for stem, count in Counter(file.stem for file in files).items() if count > 1]
    if twice:
        raise GuidekitError(f"{maps} has two label maps called {twice[0]}; rename one")
    return files


def _rewritten(found: Any, file: Path, coloured: bool) -> Any:
    """The image of a label map in the source's classes."""
    from guidekit.inputs.label_files import read_label_map

    remapped = found.remap(read_label_map(file, found.target))
    return remapped.coloured() if coloured else remapped.indexed()


def _write_maps(found: Any, files: list[Path], out: Path, coloured: bool) -> list[str]:
    """Writes label maps in the source's classes; the names of the files."""
    from guidekit.images import save_image

    names = [f"{file.stem}.png" for file in files]
    for file, name in zip(files, names, strict=True):
        out.mkdir(parents=True, exist_ok=True)
        save_image(_rewritten(found, file, coloured), out / name)
    return names


def _told(found: Any, out: Path, written: list[str]) -> str:
    """What stands for what, where it is, and what to do with it."""
    from guidekit.affinity.report import summary

    lines = summary(found)
    if written:
        lines.append(f"wrote    {len(written)} label maps in {found.source.name!r}'s classes")
    lines.append(f"wrote    {out}/")
    if not written:
        lines.append(
            "next     guidekit sample --map MAP.png --affinity "
            f"{out}, with --model or --control FOLDER of {found.source.name!r}'s classes"
        )
    return "\n".join(lines)
