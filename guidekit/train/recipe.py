"""Recipes: a TOML file names a model, its picture size and the stages that train it.

A stage is a task (see TASKS), the loop's options and the task's own. Later stages read what earlier
ones exported; a run that is started again continues where it was.
"""

import dataclasses
import importlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from guidekit.config import convert, option_kinds
from guidekit.loading import ZOO
from guidekit.train.denoiser import DenoiserOptions, DenoiserTask
from guidekit.train.digits import DigitsOptions, DigitsTask
from guidekit.train.judge import JudgeOptions, JudgeTask
from guidekit.train.loop import Loop, Options, Task
from guidekit.train.names import NamesTask
from guidekit.train.pixels import PixelsOptions, PixelsTask
from guidekit.train.processes import processes
from guidekit.train.text import TextOptions, TextTask
from guidekit.train.vae import VAEOptions, VAETask
from guidekit.train.worlds import SHAPES, source, with_cutouts

Make = Callable[[Any, Path, int, bool], Task]  # options, folder, size, quiet


def _vae(options: VAEOptions, folder: Path, size: int, quiet: bool) -> Task:
    start = folder / options.start if options.start else None
    return VAETask(options, size, start, source(options))


def _text(options: TextOptions, folder: Path, size: int, quiet: bool) -> Task:
    world = source(options)
    return TextTask(options) if world is SHAPES else NamesTask(options, world)


def _denoiser(options: DenoiserOptions, folder: Path, size: int, quiet: bool) -> Task:
    vae = AutoencoderKL.from_pretrained(folder / options.vae)
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
}


def task_kind(name: str) -> tuple[type, Make]:
    """The options of a task and what makes it from them, the run's folder and the size."""
    kind = TASKS[name]
    if isinstance(kind, str):
        module = importlib.import_module(kind)
        return module.OPTIONS, module.make
    return kind


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
    """A built-in recipe by name, or a file. Raises ValueError that names the key at fault."""
    path = ZOO / f"{name}.toml" if str(name) in recipes() else Path(name)
    try:
        table = tomllib.loads(path.read_text())
    except OSError:
        raise ValueError(f"no recipe {name}; there are {', '.join(recipes())}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not TOML: {error}") from None
    stages = table.get("stage")
    if set(table) != {"model", "size", "stage"} or not (
        isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)
    ):
        raise ValueError(f"recipe {path}: it has the keys model, size and [[stage]] tables")
    size = convert(table["size"], int, f"recipe {path}: size")
    if size < 1:
        raise ValueError(f"recipe {path}: size must be 1 or more, not {size}")
    stages = tuple(_stage(dict(entry), path) for entry in stages)
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"recipe {path}: two stages have one name; give each its own: {names}")
    return Recipe(_folder_name(table["model"], f"recipe {path}: model"), size, stages)


def _stage(entry: dict, path: Path) -> Stage:
    """One [[stage]] table; every key belongs to the loop or to the task."""
    task = entry.pop("task", None)
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"recipe {path}: no task {task!r}; there are {', '.join(TASKS)}")
    name = entry.pop("name", task)
    kind = task_kind(task)[0]
    kinds, own_kinds = option_kinds(Options), option_kinds(kind)
    for key in entry:
        if key not in kinds | own_kinds:
            known = ", ".join(sorted(kinds | own_kinds))
            raise ValueError(f"recipe {path}: stage {name} has no option {key!r}; it has {known}")
    if "steps" not in entry:
        raise ValueError(f"recipe {path}: stage {name} lacks steps, the length of its training")
    entry = {
        k: convert(v, (kinds | own_kinds)[k], f"recipe {path}: stage {name}: {k}")
        for k, v in entry.items()
    }
    try:
        loop = Options(**loop_defaults(task) | {k: v for k, v in entry.items() if k in kinds})
        own = kind(**{k: v for k, v in entry.items() if k in own_kinds})
    except ValueError as error:
        raise ValueError(f"recipe {path}: stage {name}: {error}") from None
    return Stage(_folder_name(name, f"recipe {path}: name"), task, loop, own)


def _folder_name(name: Any, what: str) -> str:
    """The name, which becomes a folder inside the output's. Raises ValueError for a path."""
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{what} must be a folder's name, not {name!r}")
    return name


def train(
    recipe: str | Path,
    out: str | Path = "runs",
    quiet: bool = False,
    overrides: dict[str, Any] | None = None,
    cutouts: str | Path | None = None,
) -> Path:
    """Trains all stages of a recipe under `out/<model>/` and returns the finished model's folder.

    overrides: options of the loop for every stage, such as steps or batch. cutouts: the folder of
    the stages whose source is cut-outs. A stage that was finished before is passed over.
    """
    plan = read_recipe(recipe)
    processes()
    folder = Path(out) / plan.model
    model = folder
    for stage in plan.stages:
        model = folder / stage.name / "model"
        if model.exists():
            if not quiet:
                print(f"finished {stage.name}: {model} (remove it to train it again)")
            continue
        options = dataclasses.replace(stage.loop, **(overrides or {}))  # refused before the work
        torch.manual_seed(stage.loop.seed)  # of the first weights
        own = with_cutouts(stage.options, cutouts)
        task = task_kind(stage.task)[1](own, folder, plan.size, quiet)
        loop = Loop(task, options, folder / stage.name, quiet)
        loop.run()
        part = model.with_name("model.part")  # a kill while it is written leaves no model
        loop.export(part)
        if loop.accelerator.is_main_process:
            part.replace(model)
        loop.accelerator.wait_for_everyone()
    return model
