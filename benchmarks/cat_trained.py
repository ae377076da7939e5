"""Rows of benchmarks/cat.py that train: models of label maps on a few shots, and from nothing."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cat_models import (
    AGAINST,
    FASTER,
    SIZE,
    TARGET,
    Draw,
    Group,
    Lab,
    Picks,
    affinity_rows,
    ceilings,
    cell,
    drawn,
    matrix_of,
    mean_right,
    named,
)
from guidekit import load
from guidekit.synthesis.data import Examples, ShotExamples, WorldExamples
from guidekit.synthesis.train import MapsOptions, MapsTask
from guidekit.train import Loop, Options
from guidekit.train.precision import emulates_bf16

MANY = 10_000  # prints of the reference that had enough of them
HELD_OUT = 5
FAST = 1e-3  # the rate of models that begin from nothing


class Limited(WorldExamples):
    """Prints, of which there are `MANY`."""

    def pairs(self, numbers: range, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and maps, the same ones again after the last."""
        return super().pairs([number % MANY for number in numbers], generator)


@dataclass(frozen=True)
class Training:
    """How a row is trained: from the host under an affinity, with new filters, or from nothing."""

    picks: Tensor | None
    start: bool
    steps: int
    seed: int = 0
    lr: float = 3e-4


def fine_tuned(
    lab: Lab,
    draws: dict[int, list[Draw]],
    rows: dict[str, Picks],
    right: Callable[[Tensor], int],
) -> list[Group]:
    """The same after training on the shots, beside models without an affinity."""
    groups = ceilings(lab, draws)[:-1]
    for count, (own, *_) in draws.items():
        seeds = lab.sizes.seeds if count == min(draws) else 1
        held = min(HELD_OUT, count // 4)
        examples = ShotExamples(own.shots, TARGET, SIZE, held, flips=True)
        for name, several in trainings(lab, own, rows, seeds).items():
            cells = [trained_cell(lab, name, count, t, examples, own.pixels) for t in several]
            picks = [t.picks for t in several if t.picks is not None]
            groups.append(Group(name, count, mean_right(picks, right) if picks else None, cells))
    return [*groups, reference(lab)]


def trainings(lab: Lab, own: Draw, rows: dict[str, Picks], seeds: int) -> dict[str, list[Training]]:
    """The trainings of every row; those whose spread is shown have several seeds."""
    sizes, found = lab.sizes, {}
    for name, several in affinity_rows(lab, [own], rows).items():
        picks = [picks for _, picks in several]
        again = picks * seeds if name == "vote" or name in AGAINST else picks
        found[name] = [Training(p, True, sizes.tuning, i) for i, p in enumerate(again)]
    vote = found["vote"][0].picks
    found[FASTER] = [Training(vote, True, sizes.tuning, i, FAST) for i in range(seeds)]
    found["fresh filters"] = [Training(None, True, sizes.tuning)]
    found["scratch"] = [Training(None, False, sizes.tuning, i, FAST) for i in range(seeds)]
    found["scratch, longer"] = [Training(None, False, sizes.long, 0, FAST)]
    return found


def reference(lab: Lab) -> Group:
    """Trained from nothing on many prints."""
    training = Training(None, False, lab.sizes.reference, 0, FAST)
    cells = [trained_cell(lab, "scratch", MANY, training, Limited("prints", SIZE), None)]
    return Group(f"scratch on {MANY}", MANY, None, cells)


def trained_cell(
    lab: Lab, name: str, count: int, training: Training, examples: Examples, known: Tensor | None
) -> dict:
    """The cell of a row that is trained; the training itself goes on where it was stopped."""
    facts = {"method": name, "shots": count, "training seed": training.seed}
    facts |= {"training steps": training.steps, "lr": training.lr, "batch": lab.sizes.batch}
    facts |= {"picks": named(training.picks)}
    own = hashlib.sha256(json.dumps(facts | lab.facts, sort_keys=True).encode()).hexdigest()[:8]
    folder = lab.folder / "trained" / f"{name} {count} {own}".replace(",", "").replace(" ", "-")
    make = partial(_trained, lab, training, examples, folder)
    return cell(lab, {"part": "fine-tuned"} | facts, make, known)


def _trained(lab: Lab, training: Training, examples: Examples, folder: Path) -> Tensor:
    own = lab.host.unet.config
    options = MapsOptions(channels=tuple(own.block_out_channels), layers=own.layers_per_block)
    matrix = None if training.picks is None else matrix_of(training.picks)
    torch.manual_seed(training.seed)  # of new weights
    task = MapsTask(options, examples, SIZE, lab.host if training.start else None, matrix)
    loop = Options(
        steps=training.steps,
        batch=lab.sizes.batch,
        lr=training.lr,
        warmup=min(20, training.steps),
        ema=0.99 if training.steps <= lab.sizes.long else 0.999,
        seed=training.seed,
        save_every=50,
        preview_every=1000,
        precision="no" if emulates_bf16(torch.device("cpu")) else "bf16",
    )
    running = Loop(task, loop, folder, quiet=True)
    running.run()
    running.export(folder / "model")
    return drawn(lab, load(str(folder / "model"), "cpu"))
