"""`guidekit sample`. Everything that needs torch is imported inside."""

import dataclasses
import json
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.terminal import images, say
from guidekit.errors import GuidekitError
from guidekit.system.progress import Progress
from guidekit.zoo.shipped import DEFAULT

# The options of `sample` have no defaults here, so that a config file shows through.
OPTIONS = (
    ("--model", str, f"Built-in name, pipeline directory, hub id or PLUGIN:NAME [{DEFAULT}]."),
    ("--prompt", str, "What to draw; default a small example with its layout."),
    ("--negative", str, "What not to draw."),
    ("--label", int, "Class to draw, for models of classes."),
    ("--layout", click.Path(path_type=Path), "JSON file with prompt and segments."),
    (
        "--map",
        click.Path(path_type=Path),
        "Label map, for models of maps and controls without an image.",
    ),
    ("--labels", str, "Label set of --map: ade20k-150, coco-stuff-182, a JSON file [the model's]."),
    (
        "--affinity",
        click.Path(path_type=Path),
        "From `guidekit affinity`: turns --map into its source.",
    ),
    ("--image", click.Path(path_type=Path), "Image to follow, by models and plugins that can."),
    ("--image-folder", click.Path(path_type=Path), "Images to follow, a class each: a data set."),
    ("--per-image", int, "Images for each of --image-folder, from the first seed on [1]."),
    ("--seeds", str, "An image for each: 0-7 or 0,3,9 [0-3]."),
    ("--steps", int, "Number of denoising steps [the model's, else 50]."),
    ("--scheduler", str, "ddim, dpm++, euler-a, lcm, dpm++:karras, ... [the model's]."),
    ("--cfg", float, "Classifier-free guidance scale, 1 for none [the model's]."),
    ("--embedded-cfg", float, "Guidance scale that a distilled model takes as input [its own]."),
    ("--eta", float, "Noise that DDIM adds at each step, 0 for none to 1 for DDPM's [0]."),
    ("--height", int, "Height in pixels [the model's]."),
    ("--width", int, "Width in pixels [the model's]."),
    ("--batch", int, "Images drawn at once [4]."),
    ("--memory", str, "fast, or low: gradients are computed with less memory [fast]."),
    ("--attention", str, "eager, sdpa, triton or xformers [the best that runs here]."),
    ("--device", str, "cpu, cuda, cuda:1 [cuda if there is one]."),
    ("--dtype", str, "float32, float16 or bfloat16 [float32 on a CPU and for built-ins]."),
    ("--nonfinite", str, "raise, or zero: skip gradients that are not finite [raise]."),
    ("--tries", int, "Draws of an image that a plugin rejects [1]."),
    (
        "--particles",
        int,
        "Images of so many seeds in a row are a group, for plugins such as fk [1].",
    ),
    (
        "--out",
        click.Path(path_type=Path),
        "New folder; of a taken name NAME-2 [out/DATE-PROMPT, else out/DATE-MODEL].",
    ),
)
LISTS = (
    ("--segment", "PHRASE=MASK.png or PHRASE=left,top,right,bottom; @0.7 at the end: strength."),
    (
        "--control",
        "FOLDER=IMAGE.png@SCALE:START-STOP, a ControlNet or T2I-Adapter; all but FOLDER may lack.",
    ),
    ("--plugin", "Plugin to use; repeat for several, in order."),
    ("--no-plugin", "Plugin that must not be used or imported."),
    ("--set", "Option of a plugin, such as zest.scale=2."),
    ("--grid", "Values to draw a sheet over, such as zest.scale=0.5,1,2; once or twice."),
)


def sample_options(command: Callable) -> Callable:
    """Adds the options of `sample`, in the order of the tables above."""
    for flag, text in reversed(LISTS):
        command = click.option(flag, multiple=True, help=text)(command)
    for flag, kind, text in reversed(OPTIONS):
        command = click.option(flag, type=kind, default=None, help=text)(command)
    return command


@click.command()
@sample_options
@click.option(
    "--compile",
    is_flag=False,
    flag_value="inductor",
    default=None,
    metavar="[BACKEND]",
    help="Compile the denoiser; torch.compile's inductor unless another is named [not].",
)
@click.option("--append-phrases", is_flag=True, default=None, help="Add phrases to the prompt.")
@click.option(
    "--compare/--no-compare", default=None, help="Draw the same seeds unguided too [compare]."
)
@click.option("--config", type=click.Path(path_type=Path), help="TOML file or run.json to follow.")
@click.option(
    "--plan", type=click.Path(path_type=Path), help="Blocks to draw: a plan.json, or its folder."
)
@click.option("--count", type=int, help="Images to draw in blocks, by any number of processes.")
@click.option("--block", type=int, help="Images of a block, which are one batch [16].")
@click.option("--form", help="folders, or tars: what a block becomes [folders].")
@click.option("--shard", help="This process's share of the blocks, such as 2/8 [any that is free].")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
def sample(config: Path | None, quiet: bool, as_json: bool, **flags: Any) -> None:
    """Draw images, guided by plugins, into a new folder."""
    from guidekit.cli.settings import make_settings, read_config

    if _draws_blocks(config, flags):
        _draw_blocks(config, flags, quiet, as_json)
        return
    settings = make_settings({} if config is None else read_config(config), flags)
    if flags["compare"] and settings.image_folder is not None:
        raise GuidekitError(
            "--compare is not for --image-folder, whose images are drawn once; leave it out"
        )
    silent = quiet or as_json
    if not silent:
        say(f"loading  {settings.model}")
    if flags["grid"]:
        _sample_grid(settings, flags, silent, as_json)
        return
    with warnings.catch_warnings():  # what matters of them is in the account's notes
        warnings.simplefilter("ignore")
        session = prepared(settings, flags["no_plugin"])
        if not silent:
            say(_introduction(session))
        run = drawn(session, silent)
    if as_json:
        click.echo(json.dumps({"folder": str(session.plan.folder), **run}))
    elif not quiet:
        say(_conclusion(session, run))


def _draws_blocks(config: Path | None, flags: dict[str, Any]) -> bool:
    """Whether a plan of blocks is asked for. Raises GuidekitError for what does not go with it."""
    if flags["plan"] is not None:
        kept = ("plan", "out", "shard", "device", "no_plugin")
        others = [name for name, value in flags.items() if name not in kept and value]
        if others or config is not None:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in others or ["config"])
            raise GuidekitError(f"{names}: a plan says it all; write it there, or leave --plan out")
    elif flags["count"] is None:
        for name in ("block", "form", "shard"):
            if flags[name] is not None:
                raise GuidekitError(f"--{name} is for blocks; give --count, or --plan")
        return False
    for name in ("compare", "batch", "grid"):
        if flags[name]:
            raise GuidekitError(f"--{name} is not for --count; a batch is a --block, drawn once")
    return True


def _draw_blocks(config: Path | None, flags: dict[str, Any], quiet: bool, as_json: bool) -> None:
    """Draws what is free of a plan of blocks."""
    from guidekit.cli.scale.command import draw_count, draw_plan
    from guidekit.cli.settings import make_settings, read_config

    silent = quiet or as_json
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if flags["plan"] is not None:
                done = draw_plan(flags["plan"], flags, silent)
            else:
                settings = make_settings({} if config is None else read_config(config), flags)
                done = draw_count(settings, flags, silent)
        except KeyboardInterrupt:
            say("stopped: the same command goes on from here", err=True)
            sys.exit(130)
    if as_json:
        click.echo(json.dumps(done))


def _sample_grid(settings: Any, flags: dict[str, Any], silent: bool, as_json: bool) -> None:
    """Draws a run for every combination of values, and a sheet of them all."""
    from guidekit.cli.grid import SHEET, cells_of, draw_cells, parse_axes
    from guidekit.cli.models import loading_once
    from guidekit.outputs.folders import new_folder, removed_if_empty

    axes = parse_axes(flags["grid"])
    cells = cells_of(settings, axes)
    load = loading_once()
    folder = new_folder(settings.out, settings.prompt or Path(settings.model).name)

    def draw(cell: Any, out: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = dataclasses.replace(cell.settings, out=out)
            run = drawn(prepared(own, flags["no_plugin"], load), silent)
        if not silent:
            say(f"cell     {cell.name}: {_energies(run['record'])}")

    with removed_if_empty(folder):
        draw_cells(folder, axes, cells, draw)
    if as_json:
        rows = [{"row": c.row, "column": c.column, "folder": str(folder / c.name)} for c in cells]
        click.echo(json.dumps({"folder": str(folder), "sheet": str(folder / SHEET), "cells": rows}))
    elif not silent:
        say(f"wrote    {folder}/: {SHEET}, and a folder for each of {len(cells)} cells")


def _energies(record: dict[str, Any]) -> str:
    """Energies of a run in a line, and its time."""
    energies = [f"{n} {e[0]:.4g} -> {e[1]:.4g}" for n, e in record["energy"].items() if e]
    return ", ".join([*energies, f"{record['seconds']:.1f} s"])


def prepared(settings: Any, blocked: tuple[str, ...], load: Callable | None = None) -> Any:
    """The session for the settings, ready to draw."""
    from guidekit.cli.models import load_model
    from guidekit.cli.plan import make_plan
    from guidekit.cli.session import Session
    from guidekit.outputs.folders import removed_if_empty

    plan = make_plan(settings, blocked, load or load_model)
    with removed_if_empty(plan.folder):
        return Session(plan)


def drawn(session: Any, silent: bool) -> dict[str, Any]:
    """Draws, and tells how far it came; what was finished before a failure is named."""

    def done() -> str:
        finished = session.record.finished
        are = "is" if len(finished) == 1 else "are"
        return f"{images(len(finished), 'finished')} {are} in {session.plan.folder}"

    with Progress(silent=silent, leave=False) as progress:
        try:
            return session.draw(progress)
        except KeyboardInterrupt:
            say(f"stopped: {done()}", err=True)
            sys.exit(130)
        except Exception as error:
            if session.record.finished:
                error.add_note(done())
            raise


def _introduction(session: Any) -> str:
    """What is about to be drawn."""
    plan, facts = session.plan, session.record.facts
    s = plan.settings
    names = [f"{g.name} (scale {g.scale:g}, {g.window})" for g in plan.guidances]
    lines = [
        f"model    {s.model} ({facts['model']['class']}), {s.device}, {s.dtype}",
        *([f"prompt   {s.prompt}"] if s.prompt else []),
        *([f"label    {s.label}"] if s.label is not None else []),
        *map(_segment, facts["tokens"]),
        *map(_control, facts["controls"]),
        f"plugins  {', '.join(names) or 'none'}",
        *(f"sites    {name}: {_sites(sites)}" for name, sites in session.sites.items() if sites),
        *(f"note     {note}" for note in session.notes),
        f"drawing  seeds {s.seeds}, {s.steps} steps, cfg {s.cfg:g}"
        + (", and the same unguided" if plan.compares else ""),
    ]
    return "\n".join(lines)


def _sites(sites: list[str]) -> str:
    """Where a guidance reads or edits the model; index.html lists all of them."""
    if len(sites) == 1:
        return sites[0]
    return f"{len(sites)} from {sites[0]} to {sites[-1]}"


def _segment(row: dict[str, Any]) -> str:
    """A segment's tokens, and how much of the image its mask covers."""
    share = f"{100 * row['coverage']:.3g}% of the image"
    return f"segment  {row['phrase']}: tokens {row['columns']}, {share}"


def _control(row: dict[str, Any]) -> str:
    """A control, what it looks at, and when it acts."""
    return (
        f"control  {row['model']} ({row['class']}): {row['image']}, scale {row['scale']:g}, "
        f"{row['start']:g} to {row['stop']:g}"
    )


def _conclusion(session: Any, run: dict[str, Any]) -> str:
    """What came of it, where it is, and what to try next."""
    record, folder = run["record"], session.plan.folder
    notes = [note for note in record["notes"] if note not in session.notes]
    if session.plan.guidances and all(g.scale == 0 for g in session.plan.guidances):
        notes.append("every scale is 0, so these are the unguided images")
    lines = [f"note     {note}" for note in notes]
    for plugin, energy in record["energy"].items():
        if energy is not None:
            change = _change(record["account"], plugin)
            lines.append(f"energy   {plugin} {energy[0]:.4g} -> {energy[1]:.4g}{change}")
    if record.get("inside"):
        lines.append(f"inside   {_inside(record['inside'], run['segment'])}")
    if (asked := session.plan.settings.out) is not None and asked != folder:
        lines.append(f"note     {asked} was there already, so the folder is {folder}")
    for plugin, both in record.get("acceptance", {}).items():
        lines.append(f"accepted {plugin} {both['accepted']} of {both['drawn']} drawn")
    lines.append(
        f"wrote    {folder}/: {images(len(record['finished']))}, index.html, run.json "
        f"in {record['seconds']:.1f} s"
    )
    lines.append(f"look at  {folder / 'index.html'}")
    lines.append(f"next     {_next(session)}")
    return "\n".join(lines)


def _change(rows: list[dict[str, Any]], plugin: str) -> str:
    """How long a plugin's change was beside the model's output, on average; nothing if unknown."""
    own = [row["update_ratio"] for row in rows if row["plugin"] == plugin and "update_ratio" in row]
    ratios = [value for row in own for value in row if value is not None]
    return f", change {sum(ratios) / len(ratios):.2g} of the model's output" if ratios else ""


def _inside(found: dict[str, list[float]], segments: list[dict[str, Any]]) -> str:
    """How much of each phrase's last map lies inside its mask, on average over the images."""
    shares = [sum(column) / len(column) for column in zip(*found.values(), strict=True)]
    own = zip(segments, shares, strict=True)
    told = ", ".join(f"{segment['phrase']} {share:.0%}" for segment, share in own)
    return f"{told} of the last attention inside its mask"


def _next(session: Any) -> str:
    """A command worth trying after this run: what harms no image, not a larger scale."""
    plan, account = session.plan, session.record.account
    if not plan.guidances:
        return "guidekit plugins"
    for guidance in plan.guidances:
        if guidance.scale == 0 or not account.acted(guidance.name):
            return f"guidekit plugins show {guidance.name}"
    again = f"guidekit sample --config {shlex.quote(str(plan.folder / 'run.json'))}"
    if other := _tuned_beside(plan):
        return f"{again} --plugin {other}  # tuned for {plan.settings.model} too"
    first = max(plan.settings.seeds) + 1
    if plan.follows_folder:
        return f"{again} --seeds {first}  # other images of the same"
    last = first + len(plan.settings.seeds) - 1
    return f"{again} --seeds {first}{f'-{last}' * (last > first)}  # other seeds"


def _tuned_beside(plan: Any) -> str | None:
    """A plugin that the model is tuned for and the run leaves out, where there is a layout.

    Without a layout a tuned plugin may need what this run does not have, such as a head.
    """
    from guidekit.zoo.shipped import model_defaults

    if not plan.condition.segments:
        return None
    used = {guidance.name for guidance in plan.guidances}
    tuned = model_defaults(plan.settings.model).get("plugin", {})
    return next((name for name in tuned if name not in used), None) if used & set(tuned) else None
