"""Rows of benchmarks/cat.py that train: models of label maps on a few shots, and from nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cat_models import (
    SIZE,
    TARGET,
    Lab,
    Picks,
    affinity_rows,
    ceilings,
    cell,
    drawn,
    matrix_of,
    mean_right,
    named,
    row,
    stacked,
)
from guidekit import load
from guidekit.affinity import Affinity, Shot
from guidekit.synthesis.data import Examples, ShotExamples, WorldExamples
from guidekit.synthesis.train import MapsOptions, MapsTask
from guidekit.train import Loop, Options
from guidekit.train.precision import emulates_bf16

MANY = 10_000  # prints of the reference that had enough of them
HELD_OUT = 5


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
    shots: dict[int, list[Shot]],
    found: dict[int, Affinity],
    rows: dict[str, Picks],
    right: Callable[[Tensor], int],
) -> list[dict]:
    """The same after training on the shots, beside models without an affinity."""
    lines = ceilings(lab, shots)[:-1]
    sizes = lab.sizes
    for count, own in found.items():
        spread = range(sizes.seeds if count == min(found) else 1)
        trainings: dict[str, list[Training]] = {}
        for name, seeded in affinity_rows(lab, own, rows).items():
            again = seeded[:1] * len(spread) if name == "vote" else seeded[: len(spread)]
            trainings[name] = [Training(p, True, sizes.tuning, i) for i, (_, p) in enumerate(again)]
        trainings["fresh filters"] = [Training(None, True, sizes.tuning)]
        trainings["scratch"] = [Training(None, False, sizes.tuning, i, 1e-3) for i in spread]
        trainings["scratch, longer"] = [Training(None, False, sizes.long, 0, 1e-3)]
        known = stacked(shots[count])
        for name, several in trainings.items():
            held = min(HELD_OUT, count // 4)
            examples = ShotExamples(shots[count], TARGET, SIZE, held, flips=True)
            cells = [trained_cell(lab, name, count, t, examples, known) for t in several]
            picks = [(0, t.picks) for t in several if t.picks is not None]
            lines.append(row(lab, name, count, mean_right(picks, right) if picks else None, cells))
    return [*lines, reference(lab)]


def reference(lab: Lab) -> dict:
    """Trained from nothing on many prints."""
    training = Training(None, False, lab.sizes.reference, 0, 1e-3)
    cells = [trained_cell(lab, "scratch", MANY, training, Limited("prints", SIZE), None)]
    return row(lab, f"scratch on {MANY}", MANY, None, cells)


def trained_cell(
    lab: Lab, name: str, count: int, training: Training, examples: Examples, known: Tensor | None
) -> dict:
    """The cell of a row that is trained; the training itself goes on where it was stopped."""
    facts = {"method": name, "shots": count, "training seed": training.seed}
    facts |= {"training steps": training.steps, "lr": training.lr, "batch": lab.sizes.batch}
    facts |= {"picks": named(training.picks)}
    words = [name, str(count), str(training.steps), str(training.seed), facts["picks"]]
    folder = lab.folder / "trained" / "-".join(words).replace(" ", "-").replace(",", "")
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
