"""Recipes: a TOML file names a model, its image size and the stages that train it.

A stage is a task (see TASKS), the loop's options and the task's own. Later stages read what earlier
ones exported; a run that is started again continues where it was.
"""

import dataclasses
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from guidekit.errors import GuidekitError
from guidekit.options import convert, option_kinds
from guidekit.system.locks import held, holder
from guidekit.system.untrusted import file_name, read_toml
from guidekit.train.denoiser import DenoiserOptions, DenoiserTask
from guidekit.train.digits import DigitsOptions, DigitsTask
from guidekit.train.durable import put
from guidekit.train.identity import check_same, digest_of, identity, keep
from guidekit.train.judge import JudgeOptions, JudgeTask
from guidekit.train.loop import Loop, Options, Task
from guidekit.train.names import NamesTask
from guidekit.train.pixels import PixelsOptions, PixelsTask
from guidekit.train.processes import processes
from guidekit.train.text import TextOptions, TextTask
from guidekit.train.vae import VAEOptions, VAETask
from guidekit.train.worlds import SHAPES, source, with_cutouts
from guidekit.zoo.shipped import ZOO

Make = Callable[[Any, Path, int, bool], Task]  # options, folder, size, quiet


def _vae(options: VAEOptions, folder: Path, size: int, quiet: bool) -> Task:
    start = folder / options.start if options.start else None
    return VAETask(options, size, start, source(options))


def _text(options: TextOptions, folder: Path, size: int, quiet: bool) -> Task:
    world = source(options)
    return TextTask(options) if world is SHAPES else NamesTask(options, world)


def _denoiser(options: DenoiserOptions, folder: Path, size: int, quiet: bool) -> Task:
    vae = AutoencoderKL.from_pretrained(folder / options.vae, use_safetensors=True)
    cache = folder / "latents" if options.source != "scenes" else None
    return DenoiserTask(options, vae, folder / options.text, size, source(options), cache)


def _judge(options: JudgeOptions, folder: Path, size: int, quiet: bool) -> Task:
    world = source(options)
    return JudgeTask(options, *(() if world is SHAPES else ((size,), world)))


# A text is a module with OPTIONS and `make`, imported when named: open_clip and timm are slow.
TASKS: dict[str, tuple[type, Make] | str] = {
    "vae": (VAEOptions, _vae),
    "text": (TextOptions, _text),
    "denoiser": (DenoiserOptions, _denoiser),
    "pixels": (PixelsOptions, lambda options, folder, size, quiet: PixelsTask(options, size)),
    "clip": "guidekit.train.clip",
    "noisy-clip": "guidekit.noisy_clip.train",
    "judge": (JudgeOptions, _judge),
    "digits": (DigitsOptions, lambda options, folder, size, quiet: DigitsTask(options)),
    "semantica": "guidekit.semantica.train",
    "adapter": "guidekit.semantica.adapter_train",
    "tags": "guidekit.semantica.tags",
    "maps": "guidekit.synthesis.train",
    "control": "guidekit.synthesis.control_train",
    "spatial": "guidekit.synthesis.spatial_train",
}


# Options that name folders: of earlier stages, built-in, or anywhere; `data` is anywhere.
READS = {
    "vae": ("start",),
    "denoiser": ("vae", "text"),
    "noisy-clip": ("data", "base", "autoencoder"),
    "semantica": ("encoder",),
    "adapter": ("encoder", "backbone"),
    "tags": ("encoder",),
    "maps": ("data", "start", "affinity"),
    "control": ("data", "start", "affinity", "backbone"),
    "spatial": ("data", "backbone", "embedder"),
}


# What --fast-dev-run changes of every loop, and of the tasks that have such options.
FAST_LOOP = {
    "steps": 2,
    "batch": 4,
    "accumulate": 1,
    "warmup": 1,
    "log_every": 1,
    "save_every": 1,
    "workers": 0,
    "precision": "no",
}
FAST_OWN = {"compile": False, "pool": 16, "pages": 16, "limit": 64, "pairs": 16}


def task_kind(name: str) -> tuple[type, Make]:
    """The options of a task and what makes it from them, the run's folder and the size."""
    kind = TASKS[name]
    if isinstance(kind, str):
        module = importlib.import_module(kind)
        return module.OPTIONS, module.make
    return kind


def data_facts(stage: "Stage", folder: Path) -> dict[str, str]:
    """What decides a stage's weights beside its options: the files that it reads.

    Those that options of READS name, and what a task's module says by `facts(options, folder)`.
    """
    found = {}
    for option in READS.get(stage.task, ()):
        name = getattr(stage.options, option)
        places = [Path(name)] if option == "data" else [folder / name, ZOO / name, Path(name)]
        if name and (there := next(filter(Path.is_dir, places), None)):
            found[f"files of {option}"] = digest_of(there)
    if isinstance(kind := TASKS[stage.task], str):
        facts = getattr(importlib.import_module(kind), "facts", None)
        found |= facts(stage.options, folder) if facts else {}
    return found


def loop_defaults(name: str) -> dict[str, Any]:
    """The options of the loop in which a task differs from the others: its paper's."""
    kind = TASKS[name]
    return getattr(importlib.import_module(kind), "LOOP", {}) if isinstance(kind, str) else {}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a recipe: its name, task, and the options of loop and task."""

    name: str
    task: str
    loop: Options
    options: Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe file says; the last stage exports the model."""

    model: str
    size: int
    stages: tuple[Stage, ...]


def recipes() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in ZOO.glob("*.toml"))


def read_recipe(name: str | Path) -> Recipe:
    """A built-in recipe by name, or a file. Raises GuidekitError that names the key at fault."""
    path = ZOO / f"{name}.toml" if str(name) in recipes() else Path(name)
    try:
        table = read_toml(path)
    except OSError:
        raise GuidekitError(f"no recipe {name}; there are {', '.join(recipes())}") from None
    except ValueError as error:
        raise GuidekitError(f"recipe {path} is not TOML: {error}") from None
    stages = table.get("stage")
    if set(table) != {"model", "size", "stage"} or not (
        isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)
    ):
        raise GuidekitError(f"recipe {path}: it has the keys model, size and [[stage]] tables")
    size = convert(table["size"], int, f"recipe {path}: size")
    if size < 1:
        raise GuidekitError(f"recipe {path}: size must be 1 or more, not {size}")
    stages = tuple(_stage(dict(entry), path) for entry in stages)
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise GuidekitError(f"recipe {path}: two stages have one name; give each its own: {names}")
    return Recipe(file_name(table["model"], f"recipe {path}: model"), size, stages)


def _stage(entry: dict, path: Path) -> Stage:
    """One [[stage]] table; every key belongs to the loop or to the task."""
    task = entry.pop("task", None)
    if not isinstance(task, str) or task not in TASKS:
        raise GuidekitError(f"recipe {path}: no task {task!r}; there are {', '.join(TASKS)}")
    name = entry.pop("name", task)
    kind = task_kind(task)[0]
    kinds, own_kinds = option_kinds(Options), option_kinds(kind)
    for key in entry:
        if key not in kinds | own_kinds:
            known = ", ".join(sorted(kinds | own_kinds))
            raise GuidekitError(
                f"recipe {path}: stage {name} has no option {key!r}; it has {known}"
            )
    if "steps" not in entry:
        raise GuidekitError(f"recipe {path}: stage {name} lacks steps, the length of its training")
    entry = {
        k: convert(v, (kinds | own_kinds)[k], f"recipe {path}: stage {name}: {k}")
        for k, v in entry.items()
    }
    try:
        loop = Options(**loop_defaults(task) | {k: v for k, v in entry.items() if k in kinds})
        own = kind(**{k: v for k, v in entry.items() if k in own_kinds})
    except ValueError as error:
        raise GuidekitError(f"recipe {path}: stage {name}: {error}") from None
    return Stage(file_name(name, f"recipe {path}: name"), task, loop, own)


def train(
    recipe: str | Path,
    out: str | Path = "runs",
    quiet: bool = False,
    overrides: dict[str, Any] | None = None,
    cutouts: str | Path | None = None,
    fast_dev_run: bool = False,
) -> Path:
    """Trains all stages of a recipe under `out/<model>/` and returns the finished model's folder.

    overrides: options of the loop for every stage, such as steps or batch. cutouts: the folder of
    the stages whose source is cut-outs. A stage that was finished before is passed over.
    fast_dev_run: every stage for two steps on little data, nothing compiled, in
    `out/fast-dev-run/<model>/`, which is emptied first.
    """
    plan = read_recipe(recipe)
    state = processes()
    folder = Path(out) / plan.model
    if fast_dev_run:
        folder = Path(out) / "fast-dev-run" / plan.model
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        state.wait_for_everyone()
        plan = dataclasses.replace(plan, stages=tuple(map(_shortened, plan.stages)))
    for stage in plan.stages:
        options = dataclasses.replace(stage.loop, **(overrides or {}))  # refused before the work
        own = with_cutouts(stage.options, cutouts)
        stage = dataclasses.replace(stage, loop=options, options=own)
        _train_stage(stage, folder, plan.size, quiet)
    return folder / plan.stages[-1].name / "model"


def _shortened(stage: Stage) -> Stage:
    """The stage as --fast-dev-run runs it."""
    known = option_kinds(type(stage.options))
    own = {k: v for k, v in FAST_OWN.items() if k in known}
    return dataclasses.replace(
        stage,
        loop=dataclasses.replace(stage.loop, **FAST_LOOP),
        options=dataclasses.replace(stage.options, **own),
    )


def _train_stage(stage: Stage, folder: Path, size: int, quiet: bool) -> None:
    """Trains a stage while no other training does; GuidekitError where one is at it."""
    home = folder / stage.name
    home.mkdir(parents=True, exist_ok=True)
    if not processes().is_main_process:
        return _train_alone(stage, home, size, quiet)
    with held(lock := home / "training.lock", needed=False) as own:
        if not own:
            raise GuidekitError(
                f"{home} is being trained by another process ({holder(lock)}); wait for it, stop "
                "it, or train into another folder (--out)"
            )
        return _train_alone(stage, home, size, quiet)


def _train_alone(stage: Stage, home: Path, size: int, quiet: bool) -> None:
    """Trains a stage and writes its model, or passes over one that is finished and the same."""
    folder = home.parent
    model, state = home / "model", processes()
    facts = data_facts(stage, folder) | {"processes": str(state.num_processes)}
    now = identity(stage.task, size, stage.loop, stage.options, facts)
    same = check_same(home, now, stage.loop.changed)
    if model.exists() and same:
        if not quiet and state.is_main_process:
            text = f"finished {stage.name}: {model} (remove {home} to train it again)"
            print(text, flush=True)
        return
    state.wait_for_everyone()  # all have read what the first one writes
    if state.is_main_process:
        keep(home, now)
    if not quiet and state.is_main_process:
        print(_stage_text(stage), flush=True)
    torch.manual_seed(stage.loop.seed)  # of the first weights
    task = task_kind(stage.task)[1](stage.options, folder, size, quiet)
    loop = Loop(task, stage.loop, home, quiet)
    loop.run()
    part = home / "model.part"  # a kill while it is written leaves no model
    loop.export(part)
    if state.is_main_process:
        _forget_paths(part)
        if model.exists():  # of other options, which the user wants to go on from
            shutil.rmtree(model)
        put(part, model)
    state.wait_for_everyone()


def _forget_paths(model: Path) -> None:
    """Takes out of a model's configs where on this machine its parts were loaded from."""
    for path in model.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def _stage_text(stage: Stage) -> str:
    """What a stage is about to do, and why it may be silent for long at first."""
    text = f"stage    {stage.name} ({stage.task}): {stage.loop.steps} steps of {stage.loop.batch}"
    if getattr(stage.options, "compile", False):
        text += "; the first step compiles the model, which takes minutes"
    return text
