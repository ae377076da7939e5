"""The command line. Everything that needs torch is imported inside a command."""

import contextlib
import errno
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from safetensors import SafetensorError

from guidekit import __version__
from guidekit.cli_heads import augment, fit

EPILOG = "Plugins add commands under their own names; `guidekit plugins` lists the plugins."


class Commands(click.Group):
    """The built-in commands, and those of a plugin when one of that name is asked for."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """A command by name; the plugin of that name is imported for it."""
        own = super().get_command(ctx, name)
        return own or _plugin_command(name)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command; click itself would answer Ctrl-C with an empty line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None

    def main(self, args=None, prog_name=None, **extra) -> None:
        """Runs, and turns what users can cause into one line and an exit code."""
        extra["standalone_mode"] = False
        with _one_line_errors():
            code = super().main(args, prog_name or "guidekit", **extra)
            sys.exit(code if isinstance(code, int) else 0)


def _plugin_command(name: str) -> click.Command | None:
    """The one command of a plugin, or a group of its several; None if it has none."""
    from guidekit.registry import Registry, entries

    if name not in {entry.name for entry in entries()}:
        return None
    commands = Registry().commands(name)
    if not commands:
        raise ValueError(f"plugin {name!r} adds no command; see guidekit plugins show {name}")
    if len(commands) == 1:
        return commands[0]
    return click.Group(name, commands={c.name: c for c in commands})


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """One line on stderr and exit code 2 for bad input, 130 for Ctrl-C."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(0)
    except click.UsageError as error:
        command = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _fail(f"{error.format_message()}{command}")
    except click.ClickException as error:
        _fail(error.format_message())
    except click.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.EPIPE:  # `guidekit plugins | head`
            sys.stdout = None
            sys.exit(1)
        _fail(_file_error(error))
    except SafetensorError as error:  # it does not say which file
        _fail(f"a file of weights is damaged ({error}); download or save it again")
    except (ValueError, ArithmeticError) as error:
        _fail(str(error))
    except RuntimeError as error:
        if _out_of_memory(error):
            _fail(f"not enough memory; try --batch 1 or --memory low ({_first_line(error)})")
        if not str(error).startswith("attention "):  # an implementation that cannot run here
            raise
        _fail(str(error))


def _file_error(error: OSError) -> str:
    """What went wrong with which file, and what to do if the disk is full."""
    told = (error.filename, error.strerror)  # the name may be a Path
    text = ": ".join(str(part) for part in told if part) or str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{text}; free some space, or choose another folder with --out" if full else text


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether the device's or the computer's memory is full."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _fail(text: str) -> None:
    """Says what is wrong in one line and exits with 2."""
    click.echo("error: " + " ".join(text.split()), err=True)
    sys.exit(2)


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="guidekit")
def main() -> None:
    """Steer frozen diffusion backbones while they sample."""


main.add_command(fit)
main.add_command(augment)


# The options of `sample` have no defaults here, so that a config file shows through.
SAMPLE_OPTIONS = (
    ("--model", str, "Built-in name, pipeline directory, hub id or PLUGIN:NAME [scenes]."),
    ("--prompt", str, "What to draw; default a small example with its layout."),
    ("--negative", str, "What not to draw."),
    ("--label", int, "Class to draw, for models of classes."),
    ("--layout", click.Path(path_type=Path), "JSON file with prompt and segments."),
    ("--image", click.Path(path_type=Path), "Picture to follow, by models and plugins that can."),
    ("--image-folder", click.Path(path_type=Path), "Pictures to follow, a class each: a data set."),
    ("--per-image", int, "Pictures for each of --image-folder, from the first seed on [1]."),
    ("--seeds", str, "A picture for each: 0-7 or 0,3,9 [0-3]."),
    ("--steps", int, "Number of denoising steps [the model's, else 50]."),
    ("--scheduler", str, "ddim, ddpm, euler, euler-a, heun, dpm++, unipc, ... [the model's]."),
    ("--cfg", float, "Classifier-free guidance scale, 1 for none [the model's]."),
    ("--embedded-cfg", float, "Guidance scale that a distilled model takes as input [its own]."),
    ("--eta", float, "DDIM's noise [0]."),
    ("--height", int, "Height in pixels [the model's]."),
    ("--width", int, "Width in pixels [the model's]."),
    ("--batch", int, "Pictures drawn at once [4]."),
    ("--memory", str, "fast, or low: gradients are computed with less memory [fast]."),
    ("--attention", str, "eager, sdpa, triton or xformers [the best that runs here]."),
    ("--device", str, "cpu, cuda, cuda:1 [cuda if there is one]."),
    ("--dtype", str, "float32, float16 or bfloat16 [float32 on a CPU and for built-ins]."),
    ("--nonfinite", str, "raise, or zero: skip gradients that are not finite [raise]."),
    ("--tries", int, "Draws of a picture that a plugin rejects [1]."),
    ("--out", click.Path(path_type=Path), "Output folder [out/DATE-PROMPT]; never overwritten."),
)
SAMPLE_LISTS = (
    ("--segment", "PHRASE=MASK.png or PHRASE=left,top,right,bottom; @0.7 at the end: strength."),
    ("--plugin", "Plugin to use; repeat for several, in order."),
    ("--no-plugin", "Plugin that must not be used or imported."),
    ("--set", "Option of a plugin, such as zest.scale=2."),
)


def _sample_options(command: Callable) -> Callable:
    """Adds the options of `sample`, in the order of the tables above."""
    for flag, text in reversed(SAMPLE_LISTS):
        command = click.option(flag, multiple=True, help=text)(command)
    for flag, kind, text in reversed(SAMPLE_OPTIONS):
        command = click.option(flag, type=kind, default=None, help=text)(command)
    return command


@main.command()
@_sample_options
@click.option("--append-phrases", is_flag=True, default=None, help="Add phrases to the prompt.")
@click.option(
    "--compare/--no-compare", default=None, help="Draw the same seeds unguided too [compare]."
)
@click.option("--config", type=click.Path(path_type=Path), help="TOML file or run.json to follow.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def sample(config: Path | None, quiet: bool, as_json: bool, **flags: Any) -> None:
    """Draw pictures, guided by plugins, into a new folder."""
    from guidekit.config import make_settings, read_config

    settings = make_settings({} if config is None else read_config(config), flags)
    if flags["compare"] and settings.image_folder is not None:
        raise ValueError(
            "--compare is not for --image-folder, whose pictures are drawn once; leave it out"
        )
    with warnings.catch_warnings():  # what matters of them is in the account's notes
        warnings.simplefilter("ignore")
        from guidekit.studio import Studio

        studio = Studio(settings, flags["no_plugin"])
        silent = quiet or as_json
        if not silent:
            click.echo(_introduction(studio))
        run = _draw(studio, silent)
    if as_json:
        click.echo(json.dumps({"folder": str(studio.folder), **run}))
    elif not quiet:
        click.echo(_conclusion(studio, run))


def _draw(studio: Any, silent: bool) -> dict[str, Any]:
    """Draws with a bar; what was finished before a failure is named."""
    from tqdm import tqdm

    done = lambda: f"{len(studio.finished)} finished pictures are in {studio.folder}"  # noqa: E731
    with tqdm(disable=silent or not sys.stderr.isatty(), leave=False) as bar:

        def progress(step: Any, part: int, parts: int) -> None:
            bar.total = parts * step.n
            bar.update()

        try:
            return studio.draw(progress)
        except KeyboardInterrupt:
            bar.close()
            click.echo(f"stopped: {done()}", err=True)
            sys.exit(130)
        except (ValueError, ArithmeticError, OSError) as error:
            bar.close()
            text = _file_error(error) if isinstance(error, OSError) else str(error)
            raise ValueError(f"{text}; {done()}" if studio.finished else text) from error


def _introduction(studio: Any) -> str:
    """What is about to be drawn."""
    s, plugins = studio.settings, studio.guidances
    names = ", ".join(f"{g.name} (scale {g.scale:g}, {g.start:g} to {g.stop:g})" for g in plugins)
    lines = [
        f"model    {s.model} ({studio.record['model']['class']}), {s.device}, {s.dtype}",
        *([f"prompt   {s.prompt}"] if s.prompt else []),
        *([f"label    {s.label}"] if s.label is not None else []),
        *(f"segment  {t['phrase']}: tokens {t['columns']}" for t in studio.record["tokens"]),
        f"plugins  {names or 'none'}",
        f"drawing  seeds {_short(s.seeds)}, {s.steps} steps, cfg {s.cfg:g}"
        + (", and the same unguided" if studio.compares else ""),
    ]
    return "\n".join(lines)


def _short(seeds: tuple[int, ...]) -> str:
    """Seeds as the user would write them."""
    if len(seeds) > 1 and seeds == tuple(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def _conclusion(studio: Any, run: dict[str, Any]) -> str:
    """What came of it, where it is, and what to try next."""
    record, folder = run["record"], studio.folder
    lines = [f"note     {note}" for note in record["notes"]]
    for plugin, energy in record["energy"].items():
        if energy is not None:
            lines.append(f"energy   {plugin} {energy[0]:.4g} -> {energy[1]:.4g}")
    for plugin, both in record.get("acceptance", {}).items():
        lines.append(f"accepted {plugin} {both['accepted']} of {both['drawn']} drawn")
    lines.append(
        f"wrote    {folder}{'/'}: {len(record['finished'])} pictures, index.html, run.json "
        f"in {record['seconds']:.1f} s"
    )
    lines.append(f"next     {_next(studio)}")
    return "\n".join(lines)


def _next(studio: Any) -> str:
    """A command worth trying after this run."""
    if not studio.guidances:
        return "guidekit plugins"
    import dataclasses

    first = studio.guidances[0]
    scale = 2 * first.scale or 1
    try:
        dataclasses.replace(first, scale=scale)
    except ValueError:  # it has no strength to double
        return f"guidekit plugins show {first.name}"
    again = f"guidekit sample --config {studio.folder / 'run.json'}"
    return f"{again} --set {first.name}.scale={scale:g}"


@main.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """List the installed plugins; nothing of them is imported."""
    if ctx.invoked_subcommand:
        return
    import dataclasses

    from guidekit.registry import entries

    found = entries()
    if as_json:
        click.echo(json.dumps({"plugins": [dataclasses.asdict(entry) for entry in found]}))
        return
    rows = [
        (e.name, e.version, "first-party" if e.first_party else "third-party", e.distribution)
        for e in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)] if rows else []
    for row, entry in zip(rows, found, strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(f"{cells}  {entry.module}")


@plugins.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(name: str, as_json: bool) -> None:
    """Show what a plugin offers and every option of it; the plugin is imported."""
    from guidekit.describe import describe_plugin, plugin_text

    facts = describe_plugin(name)
    click.echo(json.dumps(facts) if as_json else plugin_text(facts))


@plugins.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make [guidekit-NAME].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def new(name: str, out: Path | None, as_json: bool) -> None:
    """Start a plugin of your own: a copy of the template under your name."""
    from guidekit.scaffold import new_plugin

    folder = new_plugin(name, out)
    if as_json:
        click.echo(json.dumps({"folder": str(folder)}))
    else:
        click.echo(f"wrote    {folder}/: {', '.join(sorted(p.name for p in folder.iterdir()))}")
        click.echo(f"next     cd {folder} && pip install -e . && pytest --guidekit-plugin {name}")


@main.command()
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--set", "settings", multiple=True, help="Option of every stage: steps=100.")
@click.option(
    "--cutouts", type=click.Path(path_type=Path), help="Folder of images that scenes are made of."
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def train(
    recipe: str,
    out: Path,
    settings: tuple[str, ...],
    cutouts: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a model from a built-in recipe or a TOML file; a stopped training continues."""
    from guidekit.config import convert, option_kinds, parse_value
    from guidekit.train.loop import Options
    from guidekit.train.recipe import train as run

    kinds, overrides = option_kinds(Options), {}
    for text in settings:
        option, equals, value = text.partition("=")
        if not equals or option not in kinds:
            raise ValueError(f"--set {text}: write OPTION=VALUE; there are {', '.join(kinds)}")
        overrides[option] = convert(parse_value(value), kinds[option], option)
    model = run(recipe, out, quiet=quiet or as_json, overrides=overrides, cutouts=cutouts)
    if as_json:
        click.echo(json.dumps({"model": str(model)}))
    elif not quiet:
        click.echo(f"model    {model}{_next_step(model)}")


def _next_step(model: Path) -> str:
    """What is done with a trained model, where it is a command."""
    if (index := model / "model_index.json").exists():
        kind = json.loads(index.read_text()).get("_class_name")
        rest = " --plugin semantica --image PICTURE" if kind == "SemanticaPipeline" else ""
        return f"\nnext     guidekit sample --model {model}{rest}"
    if (model / "noisy_clip.json").exists():
        return f"\nnext     guidekit sample --plugin clip --set clip.encoder={model}"
    return ""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what is installed and what works on this machine; exit code 1 if a model is damaged."""
    from guidekit.describe import doctor_facts, doctor_text

    facts = doctor_facts()
    click.echo(json.dumps(facts) if as_json else doctor_text(facts))
    sys.exit(0 if facts["healthy"] else 1)
