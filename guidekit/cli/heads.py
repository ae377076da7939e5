"""`guidekit fit` and `guidekit augment`. Everything that needs torch is imported inside."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import click

from guidekit.errors import GuidekitError
from guidekit.untrusted import printable


def _denoiser(model: str, device: str | None) -> Any:
    """The denoiser of `--model`, which may be a plugin's backbone."""
    from guidekit.backbones.denoiser import Denoiser
    from guidekit.cli.session import load_model
    from guidekit.cli.settings import Settings
    from guidekit.registry import Registry

    return Denoiser(load_model(Settings(model=model, device=device), Registry()))


@click.command()
@click.argument("shots", type=click.Path(path_type=Path))
@click.option("--model", default="digits-ddpm", show_default=True, help="As of `sample`.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--site", "sites", multiple=True, help="Wildcard of blocks; repeat for several.")
@click.option("--timestep", "timesteps", multiple=True, type=int, help="0 to 999 [500].")
@click.option("--noised", is_flag=True, help="Noise the pictures to the timestep.")
@click.option("--pool", type=click.IntRange(0), default=0, help="Side of the averages' grid [2].")
@click.option("--estimator", default="", help="logistic, ridge; of masks mlp, linear.")
@click.option("--auto", is_flag=True, help="Choose site and timestep by cross-validation.")
@click.option("--budget", default=30.0, show_default=True, help="Seconds for --auto.")
@click.option("--epochs", type=click.IntRange(1), default=50, show_default=True, help="Of the mlp.")
@click.option("--prompt", default="", help="What a model that reads text is told.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps the features.")
@click.option("--device", default=None, help="cpu, cuda, cuda:1 [cuda if there is one].")
@click.option("--seed", default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fit(shots: Path, model: str, out: Path, device: str, quiet: bool, as_json: bool, **options):
    """Fit a head on labelled pictures: class folders, images/ with masks/, or a table.

    SHOTS holds a folder of pictures per class (`positive` and `negative` for an attribute), or
    images/ and masks/ by stem (indexed PNG), or metadata.jsonl or labels.csv with a column
    file_name and the labels.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GuidekitError(f"{out} exists; choose another --out")
    if not shots.exists():
        raise GuidekitError(
            f"{shots} does not exist; give a folder of labelled pictures or a table"
        )
    from guidekit.heads import FitOptions, read_examples
    from guidekit.heads import fit as fit_head

    denoiser = _denoiser(model, device)
    channels, height, width = denoiser.latent_shape(None, None)
    size = (height * denoiser.factor, width * denoiser.factor)
    examples = read_examples(shots, size, channels if denoiser.vae is None else 3)
    head, report = fit_head(denoiser, examples, FitOptions(**options))
    head.save(out)
    if as_json:
        click.echo(json.dumps({"head": str(out), **dataclasses.asdict(report)}, default=str))
    elif not quiet:
        click.echo(printable(_fitted(report, model, out, head)))


def _fitted(report: Any, model: str, out: Path, head: Any) -> str:
    """What was fitted, how well, and the command to type next."""
    counts = ", ".join(f"{name} {count}" for name, count in report.per_class.items())
    reading = report.reading
    input_ = "noised" if reading.noised else "clean"
    lines = [f"shots    {report.kind}: {counts}"]
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
        f"next     guidekit sample --model {model} --plugin fewshot --set fewshot.head={out} "
        + ("--set fewshot.mask=MASK.png" if report.kind == "masks" else _label(head)),
    ]
    return "\n".join(lines)


def _label(head: Any) -> str:
    return f"--set {shlex.quote(f'fewshot.label={head.classes[-1]}')}"


def _scores(scores: dict) -> str:
    return ", ".join(f"{k} {v:.3g}" for k, v in scores.items()) or "none: see the note"


@click.command()
@click.option("--model", default="digits-ddpm", show_default=True, help="As of `sample`.")
@click.option("--head", type=click.Path(path_type=Path), required=True, help="Of `guidekit fit`.")
@click.option("--per-class", type=click.IntRange(1), required=True, help="Pictures of each class.")
@click.option("--class", "classes", multiple=True, help="A class; repeat for several [all].")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--plugin", default="fewshot", show_default=True, help="It has `head` and `label`.")
@click.option("--set", "changes", multiple=True, help="Option of the plugin: fewshot.scale=10.")
@click.option(
    "--tries",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Pictures drawn for one that is wanted, at most.",
)
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default=None, help="cpu, cuda, cuda:1 [cuda if there is one].")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
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
    """Write a folder of accepted, generated pictures per class."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GuidekitError(f"{out} exists; choose another --out")
    from guidekit.heads import load_head
    from guidekit.heads.augment import augment as harvest
    from guidekit.options import parse_setting
    from guidekit.registry import Registry
    from guidekit.zoo.shipped import model_defaults

    registry, denoiser = Registry(), _denoiser(model, device)
    found = load_head(head, denoiser)
    if found.config.kind != "classes":
        raise GuidekitError(
            f"{head} is a head of {found.config.kind}; augment needs one of classes"
        )
    chosen = [found.classes[found.index(name)] for name in classes] or list(found.classes)
    own = dict(model_defaults(model).get("plugin", {}).get(plugin, {}))
    for name, option, value in map(parse_setting, changes):
        if name != plugin:
            raise GuidekitError(f"--set {name}.{option}: the plugin of this run is {plugin}")
        own[option] = value

    def make(label: str) -> Any:
        return registry.make_guidance(plugin, own | {"head": str(head), "label": label})

    def tell(row: Any) -> None:
        label = printable(row.label)
        click.echo(f"{label:12s} {row.accepted} of {row.drawn} accepted ({row.rate:.2f})")

    silent = quiet or as_json
    rows = harvest(
        denoiser, make, chosen, per_class, out, seed, None if silent else tell, **options
    )
    if as_json:
        classes_ = [dataclasses.asdict(r) | {"rate": r.rate} for r in rows]
        click.echo(json.dumps({"folder": str(out), "classes": classes_}))
    elif not quiet:
        click.echo(f"wrote    {out}/")
