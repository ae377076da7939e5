"""Rows of benchmarks/cat.py that train: models of label maps on a few shots, and from nothing."""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cat_models import (
    REAL_PRINTS,
    SIZE,
    SLOWER,
    Draw,
    Group,
    Lab,
    affinity_rows,
    ceilings,
    cell,
    drawn,
    matrix_of,
    mean_right,
    named,
)
from cat_rows import DRAWN, TARGET, Picks
from guidekit import LabelMap, load
from guidekit.evaluate.judge import see
from guidekit.synthesis.data import Examples, ShotExamples, WorldExamples
from guidekit.synthesis.train import MapsOptions, MapsTask
from guidekit.synthesis.transfer import RATES
from guidekit.train import Loop, Options
from guidekit.train.precision import emulates_bf16

REFERENCE = 10_000  # prints of the model that had enough of them
HELD_OUT = 5
RATE, SLOW = RATES["maps"], 3e-4
#: Rows that are compared over several trainings at the two smallest numbers of shots.
COMPARED = ("vote", "scratch")


class Limited(WorldExamples):
    """Prints, of which there are `REFERENCE`."""

    def pairs(self, numbers: range, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and maps, the same ones again after the last."""
        return super().pairs([number % REFERENCE for number in numbers], generator)


@dataclass(frozen=True)
class Training:
    """How a row is trained: from the host under an affinity, with new filters, or from nothing."""

    picks: Tensor | None
    start: bool
    steps: int
    seed: int = 0
    lr: float = RATE


def fine_tuned(
    lab: Lab,
    draws: dict[int, list[Draw]],
    rows: dict[str, Picks],
    right: Callable[[Tensor], int],
) -> list[Group]:
    """The same after training on the shots, beside models without an affinity."""
    groups = ceilings(lab, draws)[:-1]
    for count, (own, *_) in draws.items():
        examples = shot_examples(own)
        for name, several in trainings(lab, own, rows, repeated_rows(count, draws)).items():
            cells = [trained_cell(lab, name, count, t, examples, own.pixels) for t in several]
            picks = [t.picks for t in several if t.picks is not None]
            groups.append(Group(name, count, mean_right(picks, right) if picks else None, cells))
    return [*groups, reference(lab)]


def shot_examples(own: Draw) -> ShotExamples:
    """The shots as a training has them, mirrored at random, a few held out."""
    held = min(HELD_OUT, len(own.shots) // 4)
    return ShotExamples(own.shots, TARGET, SIZE, held, flips=True)


def repeated_rows(count: int, counts: Collection[int]) -> tuple[str, ...]:
    """The rows that are trained with several seeds at a number of shots."""
    few = sorted(counts)[:2]
    if count == few[0]:
        return (*DRAWN, "scratch")
    return COMPARED if count in few else ()


def trainings(
    lab: Lab, own: Draw, rows: dict[str, Picks], repeated: Collection[str]
) -> dict[str, list[Training]]:
    """The trainings of every row; those that are `repeated` have several seeds."""
    sizes, found = lab.sizes, {}
    for name, several in affinity_rows(lab, [own], rows).items():
        picks = [picks for _, picks in several]
        found[name] = [Training(p, True, sizes.tuning, i) for i, p in enumerate(picks)]
    vote = found["vote"][0].picks
    found[SLOWER] = [Training(vote, True, sizes.tuning, 0, SLOW)]
    found["vote, longer"] = [Training(vote, True, sizes.long)]
    found["fresh filters"] = [Training(None, True, sizes.tuning)]
    found["scratch"] = [Training(None, False, sizes.tuning)]
    found["scratch, longer"] = [Training(None, False, sizes.long)]
    for name in repeated:
        found[name] = [replace(found[name][0], seed=i) for i in range(sizes.seeds)]
    return found


def reference(lab: Lab) -> Group:
    """Trained from nothing on many prints."""
    training = Training(None, False, lab.sizes.reference)
    cells = [trained_cell(lab, "scratch", REFERENCE, training, Limited("prints", SIZE), None)]
    return Group(f"scratch on {REFERENCE}", REFERENCE, None, cells)


def facts_of(lab: Lab, name: str, count: int, training: Training) -> dict[str, str | int | float]:
    """What tells a trained model apart from others, and its cells."""
    facts = {"method": name, "shots": count, "training seed": training.seed}
    facts |= {"training steps": training.steps, "lr": training.lr, "batch": lab.sizes.batch}
    facts |= {"picks": named(training.picks)}
    return facts | (lab.facts if training.start else lab.facts_of_new)


def trained_cell(
    lab: Lab, name: str, count: int, training: Training, examples: Examples, known: Tensor | None
) -> dict:
    """The cell of a row that is trained; the training itself goes on where it was stopped."""
    facts = facts_of(lab, name, count, training)
    make = partial(_drawn, lab, training, examples, facts, lab.asked[1])
    return cell(lab, {"part": "fine-tuned"} | facts, make, known)


def on_further_layouts(
    lab: Lab, draws: dict[int, list[Draw]], rows: dict[str, Picks]
) -> dict[int, dict[str, Group]]:
    """The rows that are compared, and real prints, once more on many layouts; features are kept."""
    key = {"method": REAL_PRINTS} | lab.facts | _further(lab)
    real = lab.store.cell(key, lambda: {"features": lab.seen(lab.further)})
    found = {}
    for count, (own, *_) in draws.items():
        if not set(COMPARED) <= set(repeated_rows(count, draws)):
            continue
        examples, several = shot_examples(own), trainings(lab, own, rows, COMPARED)
        found[count] = {REAL_PRINTS: Group(REAL_PRINTS, count, None, [real])}
        for name in COMPARED:
            cells = [_further_cell(lab, name, count, t, examples) for t in several[name]]
            found[count][name] = Group(name, count, None, cells)
    return found


def _further(lab: Lab) -> dict[str, str | int]:
    """What tells cells of the further layouts apart."""
    return {"part": "further", "maps": len(lab.further), "first": lab.further.start}


def _further_cell(
    lab: Lab, name: str, count: int, training: Training, examples: Examples
) -> dict[str, np.ndarray]:
    facts = facts_of(lab, name, count, training)

    def make() -> dict[str, np.ndarray]:
        images = _drawn(lab, training, examples, facts, lab.further_maps)
        return {"features": see(lab.judge, images).features}

    return lab.store.cell(facts | _further(lab), make)


def _drawn(
    lab: Lab, training: Training, examples: Examples, facts: dict, maps: list[LabelMap]
) -> Tensor:
    """What the model of a training draws; it is trained first where that is not done."""
    own = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{facts['method']} {facts['shots']} {own}".replace(",", "").replace(" ", "-")
    folder = lab.folder / "trained" / name
    if not (folder / "model").is_dir():
        _train(lab, training, examples, folder)
    return drawn(lab, load(str(folder / "model"), "cpu"), maps)


def _train(lab: Lab, training: Training, examples: Examples, folder: Path) -> None:
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
