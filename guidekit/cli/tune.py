"""`guidekit tune`: numeric options by a beam search and an independent judge.

Everything that needs torch is imported inside.
"""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from guidekit.cli.errors import traceback_option
from guidekit.cli.sample import drawn, prepared, sample_options
from guidekit.cli.terminal import say
from guidekit.errors import GuidekitError, nearest

FORMAT = 1
STATE, BEST, TRIALS = "tune.json", "best.toml", "trials"
#: Keys of [sample] that belong to the options that were found.
KEPT = ("model", "steps", "scheduler", "cfg", "embedded_cfg", "eta")


@click.command()
@click.argument("knobs", nargs=-1, required=True, metavar="PLUGIN.OPTION[=START:CAP:FACTOR]...")
@sample_options
@click.option(
    "--judge",
    "judges",
    multiple=True,
    required=True,
    help='A measure of `guidekit eval` and its options: "quality real=DIR"; repeat for a mean.',
)
@click.option("--rounds", type=click.IntRange(1), default=6, show_default=True)
@click.option("--beam", type=click.IntRange(1), default=2, show_default=True, help="Its width.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file or run.json to follow.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@traceback_option
def tune(
    knobs: tuple[str, ...],
    judges: tuple[str, ...],
    rounds: int,
    beam: int,
    config: Path | None,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Find numeric options of plugins by draws that a judge scores, which never guides.

    From small values up, each round multiplies one option, and the best go on (TFG's search). The
    same command goes on where it stopped; best.toml in --out is for `sample --config`.
    """
    from guidekit.cli.models import loading_once
    from guidekit.cli.settings import make_settings, read_config
    from guidekit.evaluate.scores import parse_score
    from guidekit.evaluate.search import beam_search, parse_knob

    if flags["out"] is None or flags["grid"]:
        raise click.UsageError("tune needs --out, a new folder or one to go on in, and no --grid")
    if flags["image_folder"] is not None:
        raise click.UsageError("tune draws one condition; give --image, or leave it out")
    flags["plugin"] = _with_plugins(knobs, flags, config)
    settings = make_settings({} if config is None else read_config(config), flags)
    settings = dataclasses.replace(settings, compare=False)
    silent = quiet or as_json
    load = loading_once()
    scores = [parse_score(text) for text in judges]
    found = [parse_knob(text, _value_in(settings, flags["no_plugin"])) for text in knobs]
    asked = {
        "knobs": [dataclasses.asdict(knob) for knob in found],
        "judges": list(judges),
        "beam": beam,
        "settings": _identity(settings),
    }
    state = _State(settings.out, asked)
    trial = _trial(settings, flags["no_plugin"], found, scores, load, state, silent)
    best = beam_search(found, trial, beam, rounds)
    row = state.row(best)
    path = write_best(state.folder / row["folder"] / "run.json", settings.out / BEST)
    if as_json:
        click.echo(json.dumps({"best": row, "config": str(path), "trials": len(state.trials)}))
    elif not silent:
        say(f"best     {_named(found, best)}: {row['score']:.4g}, of {len(state.trials)} trials")
        say(f"wrote    {path}\nnext     guidekit sample --config {path}")


def _with_plugins(
    knobs: tuple[str, ...], flags: dict[str, Any], config: Path | None
) -> tuple[str, ...]:
    """The plugins of the run: those that were named, and those whose options are tuned."""
    from guidekit.cli.settings import read_config

    named = list(flags["plugin"])
    there = [*named, *(read_config(config)["plugin"] if config else ())]
    own = [text.partition("=")[0].strip().rpartition(".")[0] for text in knobs]
    return tuple(named + [p for p in dict.fromkeys(own) if p and p not in there])


def _value_in(settings: Any, blocked: tuple[str, ...]) -> Callable[[str, str], object]:
    """What an option of a plugin is in this run."""
    from guidekit.cli.plan import guidance_options

    resolved = guidance_options(settings, blocked)

    def value(plugin: str, option: str) -> object:
        table = resolved.plugin[plugin]
        if option not in table:
            raise GuidekitError(
                f"{plugin} has no option {option!r}{nearest(option, list(table))}; it has "
                f"{', '.join(table)}"
            )
        return table[option]

    return value


def _identity(settings: Any) -> dict[str, Any]:
    """What must be the same for a search to go on."""
    from guidekit.cli.settings import dump

    return json.loads(json.dumps(dump(settings) | {"changes": settings.changes}, default=str))


class _State:
    """What was tried, kept in tune.json after every trial."""

    def __init__(self, folder: Path, asked: dict[str, Any]):
        self.folder, self.asked = folder, asked
        self.trials: list[dict[str, Any]] = []
        if (folder / STATE).exists():
            from guidekit.system.untrusted import read_object

            table = read_object(folder / STATE)
            if table.get("format") != FORMAT or table.get("asked") != asked:
                raise GuidekitError(
                    f"{folder} holds another search; repeat its command, or give a new --out"
                )
            self.trials = table["trials"]
        elif folder.exists() and any(folder.iterdir()):
            raise GuidekitError(f"{folder} holds other files; give a new --out")

    def row(self, values: tuple[float, ...]) -> dict[str, Any] | None:
        """The trial of some values; None if they were not tried yet."""
        return next((row for row in self.trials if tuple(row["values"]) == values), None)

    def next_folder(self) -> Path:
        """A new folder for a trial; what a stopped one has left is removed."""
        path = self.folder / TRIALS / str(len(self.trials))
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a finished trial."""
        self.trials.append(row)
        table = {"format": FORMAT, "asked": self.asked, "trials": self.trials}
        new = self.folder / f"{STATE}.new"
        new.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        new.replace(self.folder / STATE)


def _trial(
    settings: Any,
    blocked: tuple[str, ...],
    knobs: list[Any],
    scores: list[Any],
    load: Callable,
    state: _State,
    silent: bool,
) -> Callable[[tuple[float, ...]], float]:
    """Draws and scores some values, or recalls what they got."""
    from guidekit.evaluate.scores import mean_score

    judges = [judge for score in scores for judge in score.judges()]

    def trial(values: tuple[float, ...]) -> float:
        if (row := state.row(values)) is not None:
            return row["score"]
        folder = state.next_folder()
        own = dataclasses.replace(settings, out=folder, changes=_changed(settings, knobs, values))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = prepared(own, blocked, load)
            _check(judges, session)
            drawn(session, silent)
            score, parts = mean_score(scores, folder)
        name = folder.relative_to(state.folder).as_posix()
        state.add({"values": list(values), "score": score, "scores": parts, "folder": name})
        if not silent:
            say(f"trial    {len(state.trials)}: {_named(knobs, values)}: {score:.4g}")
        return score

    return trial


def _changed(settings: Any, knobs: list[Any], values: tuple[float, ...]) -> dict[str, Any]:
    """The run's changes with the values of the knobs."""
    changes = {plugin: dict(options) for plugin, options in settings.changes.items()}
    for knob, value in zip(knobs, values, strict=True):
        changes.setdefault(knob.plugin, {})[knob.option] = value
    return changes


def _check(judges: list[Any], session: Any) -> None:
    """Raises GuidekitError, before anything is drawn, for a judge that would guide."""
    from guidekit.evaluate.judges import guided_by
    from guidekit.outputs.folders import removed_if_empty

    tables = session.plan.settings.plugin
    for judge in judges:
        if (name := guided_by(judge, tables)) is not None:
            with removed_if_empty(session.plan.folder):
                raise GuidekitError(
                    f"{judge.name} would guide the images ({name}), so it cannot judge them; take "
                    "another judge"
                )


def _named(knobs: list[Any], values: tuple[float, ...]) -> str:
    return ", ".join(f"{k.name} {v:.4g}" for k, v in zip(knobs, values, strict=True))


def write_best(record: Path, path: Path) -> Path:
    """Writes what a run.json used of its model and plugins as a TOML file."""
    from guidekit.outputs.given import within
    from guidekit.system.untrusted import read_object

    table = read_object(record)
    lines = ["# The best of `guidekit tune`; for `guidekit sample --config`.", "[sample]"]
    lines += _pairs({key: table["sample"].get(key) for key in KEPT})
    run = record.parent.relative_to(path.parent).as_posix()
    for name, options in table["plugin"].items():
        placed = {option: within(value, run) for option, value in options.items()}
        lines += ["", f"[plugin.{json.dumps(name)}]", *_pairs(placed)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _pairs(table: dict[str, Any]) -> list[str]:
    """Lines of a TOML table; TOML knows no None, which is what is not there."""
    return [f"{key} = {_value(value)}" for key, value in table.items() if value is not None]


def _value(value: Any) -> str:
    """A value of JSON as TOML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)
