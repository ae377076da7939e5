"""`guidekit fit` and `guidekit augment`. Everything that needs torch is imported inside."""

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.terminal import images, say
from guidekit.errors import GuidekitError


def _denoiser(model: str, device: str | None) -> Any:
    """The denoiser of `--model`, which may be a plugin's backbone."""
    from guidekit.backbones.denoiser import Denoiser
    from guidekit.cli.models import load_model
    from guidekit.registry import Registry

    return Denoiser(load_model(model, Registry(), device))


def _check_new(out: Path) -> None:
    """Raises GuidekitError for a folder that holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GuidekitError(f"{out} exists; choose another --out")


@click.command()
@click.argument("shots", metavar="EXAMPLES", type=click.Path(path_type=Path))
@click.option("--model", default="digits-ddpm", show_default=True, help="As of `sample`.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option(
    "--kind",
    type=click.Choice(["shots", "readout"]),
    default="shots",
    show_default=True,
    help="readout: a map of images/ and targets/, at every noise level.",
)
@click.option("--site", "sites", multiple=True, help="Wildcard of blocks; repeat for several.")
@click.option("--timestep", "timesteps", multiple=True, type=int, help="0 to 999 [500].")
@click.option("--noised", is_flag=True, help="Noise the images to the timestep.")
@click.option(
    "--pool",
    type=click.IntRange(0),
    default=0,
    help="Average features over a grid of so many cells a side; 0 chooses [0].",
)
@click.option("--estimator", default="", help="logistic or ridge; of masks mlp or linear.")
@click.option("--auto", is_flag=True, help="Choose site and timestep by cross-validation.")
@click.option("--budget", default=30.0, show_default=True, help="Seconds for --auto.")
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Passes over the examples, of the mlp.",
)
@click.option("--iterations", type=click.IntRange(1), help="Batches, of a readout [1000].")
@click.option("--batch", type=click.IntRange(1), help="Pairs in a batch, of a readout [8].")
@click.option("--prompt", default="", help="Prompt of a model that reads text.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps the features.")
@click.option("--device", default=None, help="cpu, cuda, cuda:1 [cuda if there is one].")
@click.option("--seed", default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
def fit(
    shots: Path,
    model: str,
    out: Path,
    kind: str,
    iterations: int | None,
    batch: int | None,
    device: str,
    quiet: bool,
    as_json: bool,
    **options,
):
    """Fit a head on labelled images: class folders, images/ with masks/, or a table.

    EXAMPLES holds a folder of images per class (`positive` and `negative` for an attribute), or
    images/ and masks/ by stem (indexed PNG), or metadata.jsonl or labels.csv with a column
    file_name and the labels. With --kind readout it holds images/ and targets/ by stem: grey or
    colour images, or .npy, of what is to be read at every pixel.
    """
    _check_new(out)
    if not shots.exists():
        raise GuidekitError(f"{shots} does not exist; give a folder of labelled images or a table")
    if kind == "readout":
        own = {"steps": iterations, "batch": batch}
        own = {name: value for name, value in own.items() if value is not None}
        _fit_readout(shots, model, out, device, quiet, as_json, options, own)
        return
    if iterations or batch:
        raise click.UsageError("--iterations and --batch go with --kind readout")
    if not (quiet or as_json):
        say(f"loading  {model}")
    from guidekit.heads import FitOptions, read_examples
    from guidekit.heads import fit as fit_head

    denoiser = _denoiser(model, device)
    channels, height, width = denoiser.latent_shape(None, None)
    size = (height * denoiser.factor, width * denoiser.factor)
    examples = read_examples(shots, size, channels if denoiser.vae is None else 3)
    if not (quiet or as_json):
        say(f"fitting  a head on {images(len(examples))}")
    head, report = fit_head(denoiser, examples, FitOptions(**options))
    head.save(out)
    if as_json:
        click.echo(json.dumps({"head": str(out), **dataclasses.asdict(report)}, default=str))
    elif not quiet:
        say(_fitted(report, model, out, head))


#: Options of `fit` that a readout head has; others are refused where they were given.
OF_READOUTS = ("sites", "prompt", "seed")


def _fit_readout(
    pairs: Path,
    model: str,
    out: Path,
    device: str | None,
    quiet: bool,
    as_json: bool,
    options: dict[str, Any],
    own: dict[str, int],
) -> None:
    """Fits and saves a readout head."""
    context = click.get_current_context()
    for name in options.keys() - set(OF_READOUTS):
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} does not go with --kind readout")
    silent = quiet or as_json
    if not silent:
        say(f"loading  {model}")
    from guidekit.heads.pairs import read_pairs
    from guidekit.heads.readout_fit import ReadoutOptions, fit_readout

    denoiser = _denoiser(model, device)
    channels, height, width = denoiser.latent_shape(None, None)
    size = (height * denoiser.factor, width * denoiser.factor)
    found = read_pairs(pairs, size, channels if denoiser.vae is None else 3)
    chosen = ReadoutOptions(**own, **{name: options[name] for name in OF_READOUTS})
    if not silent:
        say(f"fitting  a readout head on {len(found)} pairs, {chosen.steps} batches")
    head, report = fit_readout(denoiser, found, chosen)
    head.save(out)
    if as_json:
        click.echo(json.dumps({"head": str(out), **dataclasses.asdict(report)}))
    elif not quiet:
        words = ["guidekit", "sample", "--model", model, "--plugin", "readout"]
        words += ["--set", f"readout.head={out}", "--set", "readout.target=MAP.png"]
        say(
            f"features {' + '.join(report.sites)}, {report.seconds:.1f} s\n"
            f"scores   {_scores(report.scores)} of the variance, of pairs held out\n"
            f"wrote    {out}/\nnext     {shlex.join(words)}"
        )


def _fitted(report: Any, model: str, out: Path, head: Any) -> str:
    """What was fitted, how well, and the command to type next."""
    counts = ", ".join(f"{name} {count}" for name, count in report.per_class.items())
    reading = report.reading
    input_ = "noised" if reading.noised else "clean"
    lines = [f"examples {report.kind}: {counts}"]
    lines += [
        f"tried    {' + '.join(c.reading.sites)} at {c.reading.timesteps[0]}, pool "
        f"{c.reading.pool}: log loss {c.log_loss:.3f}, accuracy {c.accuracy:.3f}"
        for c in report.candidates[:8]
    ]
    lines += [
        f"features {' + '.join(reading.sites)} at {list(reading.timesteps)}, {input_}",
        f"head     {report.estimator}, {head.config.channels} features, {report.seconds:.1f} s",
        f"scores   {_scores(report.scores)}",
        *(f"note     {note}" for note in report.notes),
        f"wrote    {out}/",
        f"next     {_use(report, model, out, head)}",
    ]
    return "\n".join(lines)


def _use(report: Any, model: str, out: Path, head: Any) -> str:
    """A command that draws with the head."""
    masks = report.kind == "masks"
    given = [f"head={out}", "mask=MASK.png" if masks else f"label={head.classes[-1]}"]
    words = ["guidekit", "sample", "--model", model, "--plugin", "fewshot"]
    return shlex.join(words + [w for text in given for w in ("--set", f"fewshot.{text}")])


def _scores(scores: dict) -> str:
    return ", ".join(f"{k} {v:.3g}" for k, v in scores.items()) or "none: see the note"


@click.command()
@click.option("--model", default="digits-ddpm", show_default=True, help="As of `sample`.")
@click.option(
    "--head",
    type=click.Path(path_type=Path),
    required=True,
    help="From `guidekit fit`.",
)
@click.option("--per-class", type=click.IntRange(1), required=True, help="Images of each class.")
@click.option("--class", "classes", multiple=True, help="A class; repeat for several [all].")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--plugin", default="fewshot", show_default=True, help="It has `head` and `label`.")
@click.option("--set", "changes", multiple=True, help="Option of the plugin: fewshot.scale=10.")
@click.option(
    "--tries",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Images drawn for one that is wanted, at most.",
)
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default=None, help="cpu, cuda, cuda:1 [cuda if there is one].")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
def augment(
    model: str,
    head: Path,
    classes: tuple[str, ...],
    out: Path,
    plugin: str,
    changes: tuple[str, ...],
    per_class: int,
    device: str,
    seed: int,
    quiet: bool,
    as_json: bool,
    **options,
):
    """Write a folder of accepted, generated images per class."""
    _check_new(out)
    silent = quiet or as_json
    if not silent:
        say(f"loading  {model}")
    from guidekit.heads.augment import augment as harvest

    denoiser = _denoiser(model, device)
    chosen = _classes(head, denoiser, classes)
    make = _maker(model, plugin, changes, head)
    tell = None if silent else _tell
    rows = harvest(denoiser, make, chosen, per_class, out, seed, tell, **options)
    if as_json:
        classes_ = [dataclasses.asdict(r) | {"rate": r.rate} for r in rows]
        click.echo(json.dumps({"folder": str(out), "classes": classes_}))
    elif not quiet:
        say(f"wrote    {out}/")


def _classes(head: Path, denoiser: Any, names: tuple[str, ...]) -> list[str]:
    """The classes of a head that are asked for, all of them by default."""
    from guidekit.heads import load_head

    found = load_head(head, denoiser)
    if found.config.kind != "classes":
        raise GuidekitError(
            f"{head} is a head of {found.config.kind}; augment needs one of classes"
        )
    return [found.classes[found.index(name)] for name in names] or list(found.classes)


def _maker(model: str, plugin: str, changes: tuple[str, ...], head: Path) -> Callable[[str], Any]:
    """Makes the guidance towards a class, with the options that are tuned for the model."""
    from guidekit.options import parse_setting
    from guidekit.registry import Registry
    from guidekit.zoo.shipped import model_defaults, tuned_options

    given: dict[str, Any] = {}
    for name, option, value in map(parse_setting, changes):
        if name != plugin:
            raise GuidekitError(f"--set {name}.{option}: the plugin of this run is {plugin}")
        given[option] = value
    own, registry = tuned_options(model_defaults(model), plugin, given), Registry()

    def make(label: str) -> Any:
        last = {"head": str(head), "label": label}
        return registry.make_guidance(plugin, own, changes=given | last)

    return make


def _tell(row: Any) -> None:
    """How many images of a class were accepted."""
    say(f"{row.label:12s} {row.accepted} of {row.drawn} accepted ({row.rate:.2f})")
