"""Transfer of a model or control of label maps to other classes: a recipe that is written and run.

After Class Affinity Transfer (arXiv:2304.02321): the affinity is folded into the first layer, and
all weights are trained on a few labelled images. Rate, length and choice of checkpoint are ours.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guidekit.affinity.matrix import VOTE
from guidekit.affinity.shots import read_shots
from guidekit.backbones.controls import load_control
from guidekit.errors import GuidekitError
from guidekit.synthesis.control_train import kind_of, load_backbone
from guidekit.synthesis.train import load_start
from guidekit.system.untrusted import file_name
from guidekit.train.durable import put, put_text
from guidekit.train.options import Options
from guidekit.train.recipe import task_kind, train
from guidekit.zoo.shipped import ZOO

RECIPE = "recipe.toml"
MOST_HELD_OUT = 5
#: Rates by task; maps: tried with scenes-maps (docs/results/affinity.md), control: not compared.
RATES = {"maps": 1e-3, "control": 3e-4}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What goes to which classes, and how long it is trained."""

    #: Folder of labelled images: images/, masks/, classes.json.
    shots: Path
    #: A model of label maps: a built-in, or a folder. With a control, the backbone beside it.
    model: str
    #: Folder of a ControlNet or T2I-Adapter, which is transferred in place of the model.
    control: str | None = None
    #: Folder of an affinity from its classes to the shots'; without one the filters are new.
    affinity: Path | None = None
    by: str = VOTE
    soft: bool = False
    #: None: 5, or a quarter of fewer than 20 shots.
    held_out: int | None = None
    #: 0: the affinity is folded, and nothing is trained.
    steps: int = 400
    batch: int = 16
    #: None: that of its task in RATES.
    lr: float | None = None
    seed: int = 0

    @property
    def task(self) -> str:
        """The recipe's task, after which its stage is named."""
        return "maps" if self.control is None else "control"

    def table(self) -> dict[str, Any]:
        """The options of the stage, with paths that mean the same everywhere.

        Raises GuidekitError for what does not go with a control.
        """
        count = self.held_out
        if count is None:
            count = min(MOST_HELD_OUT, len(read_shots(self.shots)) // 4)
        own = {
            "source": "shots",
            "data": str(self.shots.resolve()),
            "start": _place(self.model if self.control is None else self.control),
            "affinity": "" if self.affinity is None else str(self.affinity.resolve()),
            "by": self.by,
            "held_out": count,
            "flips": True,
        }
        if self.control is None:
            return own | {"soft": self.soft}
        if self.affinity is None or self.soft:
            raise GuidekitError("a control needs a hard affinity; give --affinity without --soft")
        kind = kind_of(load_control(self.control))
        return own | {"kind": kind, "backbone": _place(self.model)}

    def size(self) -> int:
        """Side of the images. Raises GuidekitError for a model that is none of the kind."""
        if self.control is None:
            return load_start(self.model).unet.config.sample_size
        pipeline = load_backbone(self.model)
        return pipeline.unet.config.sample_size * pipeline.vae_scale_factor

    def loop(self) -> dict[str, Any]:
        """The options of the training. Raises GuidekitError for numbers that cannot be."""
        lr = RATES[self.task] if self.lr is None else self.lr
        rows = {"steps": self.steps, "batch": self.batch, "lr": lr, "seed": self.seed}
        rows |= {"warmup": min(20, self.steps), "ema": 0.99}
        rows |= {"save_every": 50, "preview_every": 200}
        Options(**rows | {"steps": max(self.steps, 1)})  # no steps: it is folded alone
        return rows

    def recipe(self, name: str, size: int, table: dict[str, Any]) -> str:
        """The recipe as TOML, of a stage with the options of `table`."""
        rows = table | self.loop()
        lines = [f"model = {_toml(name)}", f"size = {size}", "", "[[stage]]"]
        lines += [f"task = {_toml(self.task)}", *(f"{k} = {_toml(v)}" for k, v in rows.items())]
        return "\n".join(lines) + "\n"


def _place(name: str) -> str:
    """A folder by its whole path; names of built-ins and of the hub as they are."""
    there = not (ZOO / name).is_dir() and Path(name).is_dir()
    return str(Path(name).resolve()) if there else name


def _toml(value: object) -> str:
    """A text, number or flag as TOML writes it."""
    return json.dumps(value, ensure_ascii=False)


def transfer(plan: Transfer, out: Path, quiet: bool = False, fast_dev_run: bool = False) -> Path:
    """Writes `out/recipe.toml`, trains it below `out`, and returns the model's folder.

    The same call goes on with one that was stopped. Raises GuidekitError, before anything is
    written, for a model without label maps, an affinity of other label sets, and a folder that
    holds something else.
    """
    name, home = file_name(out.name, "--out"), out / plan.task
    kind, make = task_kind(plan.task)
    table, size = plan.table(), plan.size()
    text = plan.recipe(name, size, table)
    task = make(kind(**table), out, size, quiet)
    _check_free(out, text)
    out.mkdir(parents=True, exist_ok=True)
    put_text(out / RECIPE, text)
    if plan.steps:
        return train(out / RECIPE, out.parent, quiet=quiet, fast_dev_run=fast_dev_run)
    return _folded(task, home / "model")


def _folded(task: Any, model: Path) -> Path:
    """Saves the untrained model in place of that of an earlier call, maybe of another affinity."""
    part = model.with_name("model.part")
    if part.exists():
        shutil.rmtree(part)
    model.parent.mkdir(exist_ok=True)
    task.export(part)
    if model.exists():
        shutil.rmtree(model)
    put(part, model)
    return model


def _check_free(out: Path, text: str) -> None:
    """Raises GuidekitError where `out` holds anything but the same transfer."""
    recipe = out / RECIPE
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not (recipe.is_file() and recipe.read_text(encoding="utf-8") == text):
        what = "another transfer" if recipe.is_file() else "something else"
        raise GuidekitError(f"{out} holds {what}; choose another --out, or remove it")
