"""Rows of benchmarks/cat.py that draw: models of label maps under an affinity.

Every row is a cell of its own in a folder, trained and drawn once; a stopped run goes on.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cat_rows import SOURCE, TARGET, Picks
from fewshot_store import Store
from guidekit import LabelMap, load
from guidekit.affinity import Affinity, Shot
from guidekit.evaluate.intervals import over_trainings
from guidekit.evaluate.judge import load_judge, see
from guidekit.evaluate.overlap import asked_pixels, mean_iou, overlaps
from guidekit.labels import VOID
from guidekit.synthesis.data import WorldExamples
from guidekit.synthesis.pipeline import MapsPipeline
from guidekit.synthesis.train import transferred
from guidekit.train.identity import digest_of
from guidekit.train.judge import Judge
from guidekit.train.precision import emulates_bf16
from guidekit.worlds import prints, scenes

SIZE, BATCH = 32, 50
REAL = 2_000  # prints that Frechet distances are to
SEEDS = 3  # of random affinities, and of draws of the shots or trainings whose spread is shown
#: The vote, trained at a smaller rate.
SLOWER = "vote, a third of the rate"
REAL_PRINTS = "real prints"


@dataclass(frozen=True)
class Sizes:
    """How much is drawn and trained; `tuning` is the steps of a transfer, `long` of a long one."""

    maps: int = 250
    further: int = 1_000  # layouts on which two rows are compared once more, by Frechet distance
    source_maps: int = 100  # of the source's own world
    steps: int = 20  # of the sampler
    real: int = REAL
    tuning: int = 400
    long: int = 2_000
    reference: int = 6_000
    batch: int = 16
    seeds: int = SEEDS


QUICK = Sizes(
    maps=6,
    further=8,
    source_maps=4,
    steps=2,
    real=70,
    tuning=2,
    long=3,
    reference=3,
    batch=4,
    seeds=1,
)


@dataclass(frozen=True, eq=False)
class Lab:
    """The models that all rows share, and where their cells are."""

    host: MapsPipeline
    judge: Judge
    store: Store
    folder: Path
    sizes: Sizes
    seed: int
    #: What tells cells of other models apart.
    models: dict[str, str]

    @property
    def facts(self) -> dict[str, str | int]:
        """What tells cells and trained models of other settings apart."""
        sizes = self.sizes
        return self.models | {"seed": self.seed, "maps": sizes.maps, "steps": sizes.steps}

    @property
    def facts_of_new(self) -> dict[str, str | int]:
        """The same of models that have the host's shape, but nothing of its weights."""
        own = self.host.unet.config
        return self.facts | {"host": f"{tuple(own.block_out_channels)} {own.layers_per_block}"}

    @cached_property
    def asked(self) -> tuple[Tensor, list[LabelMap]]:
        """Prints of the test split and their maps: the layouts of all rows."""
        return WorldExamples("prints", SIZE).shown(self.sizes.maps)

    @property
    def further(self) -> range:
        """Numbers of layouts that are neither asked nor among the `real` ones."""
        first = self.sizes.maps + self.sizes.real
        return range(first, first + self.sizes.further)

    @cached_property
    def further_maps(self) -> list[LabelMap]:
        """Their maps."""
        plans = [prints.scene(i, "test") for i in self.further]
        maps = [torch.from_numpy(prints.dense_labels(plan, SIZE)) for plan in plans]
        return [LabelMap(own, TARGET) for own in maps]

    @cached_property
    def real(self) -> np.ndarray:
        """The judge's features (n, 64) of other prints."""
        return self.seen(range(self.sizes.maps, self.sizes.maps + self.sizes.real))

    def seen(self, numbers: range) -> np.ndarray:
        """The judge's features (n, 64) of the prints of these numbers."""
        images = [_prints(part, "test") for part in _parts(numbers)]
        return see(self.judge, torch.cat(images) / 2 + 0.5).features


@dataclass(frozen=True, eq=False)
class Draw:
    """Labelled images of one draw, and the affinity that they speak for."""

    number: int
    shots: list[Shot]
    found: Affinity

    @cached_property
    def pixels(self) -> Tensor:
        """The images (n, 3, H, W)."""
        return torch.stack([shot.pixels for shot in self.shots])


@dataclass(frozen=True, eq=False)
class Group:
    """The cells of one row: of several draws of the shots, or of several trainings."""

    name: str
    shots: int
    #: Colours that its affinities have right, of 64, in the mean; None without an affinity.
    right: int | None
    cells: list[dict]
    #: The draw of the shots of each cell; the first of all where it is left out.
    draws: Sequence[int] = ()


def _parts(numbers: range) -> list[range]:
    return [numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH)]


def _prints(numbers: range, split: str) -> Tensor:
    plans = [prints.scene(i, split) for i in numbers]
    return scenes.pixels(torch.from_numpy(np.stack([prints.draw(p, SIZE)[0] for p in plans])))


def make_lab(
    host: Path, judge: Path, folder: Path, seed: int, quick: bool, tuning: int = 400
) -> Lab:
    """The lab, with the models of these folders."""
    sizes = QUICK if quick else Sizes(tuning=tuning, long=5 * tuning, reference=15 * tuning)
    pipeline = load(str(host), "cpu")
    network = Judge.from_pretrained(judge, dtype=torch.float32, use_safetensors=True)
    return Lab(
        pipeline,
        network.eval().requires_grad_(False),
        Store(folder / "cells"),
        folder,
        sizes,
        seed,
        {"host": digest_of(host), "judge": digest_of(judge)},
    )


def matrix_of(picks: Tensor) -> Tensor:
    """An affinity (N_s, N_t) of picks; a class for which nothing speaks is void: a column of 0."""
    found = torch.zeros(len(SOURCE), len(TARGET) + 1, dtype=torch.float64)
    said = picks != VOID
    found[picks[said], said.nonzero()[:, 0]] = 1.0
    return found[:, : len(TARGET)]


def named(picks: Tensor | None) -> str:
    """A short name of an affinity, by which cells are told apart."""
    return "none" if picks is None else hashlib.sha256(str(picks.tolist()).encode()).hexdigest()[:8]


def random_picks(found: Affinity, seed: int) -> Tensor:
    """Things for things and grounds for grounds, at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(found.allowed.T.double(), 1, generator=generator)[:, 0]


def oracle() -> Tensor:
    """A right colour and, where it is there, the right shape; grounds by the nearest colour."""
    picks = []
    for name in prints.CLASSES:
        colour, shape = name.split()
        picks.append(
            SOURCE.index(f"{prints.ACCEPTED[colour][0]} {prints.SAME.get(shape, 'square')}")
        )
    greys = torch.tensor(list(scenes.BACKGROUNDS.values()), dtype=torch.float64)
    for colour in prints.GROUNDS.values():
        near = (greys - torch.tensor(colour)).square().sum(1).argmin()
        picks.append(len(scenes.CLASSES) + int(near))
    return torch.tensor(picks)


def drawn(lab: Lab, pipeline: MapsPipeline, maps: list[LabelMap] | None = None) -> Tensor:
    """An image (n, 3, H, W) in [0, 1], in 8 bits, for every layout, from its own seed.

    Convolutions are in bf16 where the processor computes in it, as in the trainings.
    """
    maps, images = lab.asked[1] if maps is None else maps, []
    pipeline.set_progress_bar_config(disable=True)
    half = torch.autocast("cpu", torch.bfloat16, enabled=not emulates_bf16(torch.device("cpu")))
    for part in _parts(range(len(maps))):
        generators = [torch.Generator().manual_seed(lab.seed + i) for i in part]
        own, steps = [maps[i] for i in part], lab.sizes.steps
        options = {"num_inference_steps": steps, "generator": generators, "output_type": "pt"}
        with half:
            images.append(pipeline(own, **options).images.float())
    return (torch.cat(images) * 255).round() / 255


def verdict(lab: Lab, images: Tensor, shots: Tensor | None) -> dict[str, np.ndarray]:
    """What the judge sees in images of the layouts, an entry for each; distances to shots."""
    seen, classes = see(lab.judge, images), len(TARGET)
    wanted = torch.stack([own.ids for own in lab.asked[1]]).numpy() + 1
    things = np.where(wanted <= len(prints.CLASSES), wanted, 0)
    inter, union = overlaps(seen.classes, wanted, classes=classes)
    labelled = overlaps(seen.classes, things, labelled_only=True, classes=classes)
    near = np.full(len(images), np.nan)
    if shots is not None:
        flat, known = (images * 2 - 1).flatten(1), torch.cat([shots, shots.flip(-1)]).flatten(1)
        near = (torch.cdist(flat, known).min(1).values / flat.shape[1] ** 0.5).numpy()
    return {
        "inter": inter,
        "union": union,
        "asked": asked_pixels(wanted, classes),
        "labelled inter": labelled[0],
        "labelled union": labelled[1],
        "labelled asked": asked_pixels(things, classes),
        "features": seen.features,
        "near": near,
    }


def host_rows(lab: Lab) -> list[dict]:
    """The source model on held-out maps of its own world, beside real scenes, by their judge."""
    real, maps = WorldExamples("dense", SIZE).shown(lab.sizes.source_maps)
    wanted = torch.stack([own.ids for own in maps]).numpy() + 1
    wanted = np.where(wanted <= len(scenes.CLASSES), wanted, 0)  # the judge sees grounds as free
    judge, lines = load_judge(), []
    for name, make in {
        "real scenes": lambda: real / 2 + 0.5,
        "source model": lambda: drawn(lab, lab.host, maps),
    }.items():
        key = {"method": name, "part": "host", "maps": len(maps), "steps": lab.sizes.steps}
        found = lab.store.cell(
            key | lab.models | {"seed": lab.seed}, partial(_overlaps, judge, make, wanted)
        )
        line = {"method": name, "n": len(maps)}
        line["mIoU"], line["mIoU 95%"] = over_trainings(
            lambda c: mean_iou(c["inter"], c["union"], c["asked"]), [found]
        )
        lines.append(line)
    for line in lines:
        line["of the ceiling"] = line["mIoU"] / lines[0]["mIoU"]
    return lines


def _overlaps(judge: Judge, make: Callable[[], Tensor], wanted: np.ndarray) -> dict:
    """Overlaps of what the judge sees in images with maps (n, H, W)."""
    classes = len(scenes.CLASSES)
    inter, union = overlaps(see(judge, make()).classes, wanted, classes=classes)
    return {"inter": inter, "union": union, "asked": asked_pixels(wanted, classes)}


def cell(lab: Lab, key: dict, make: Callable[[], Tensor], shots: Tensor | None = None) -> dict:
    """The arrays of a row, from the images that `make` draws; `key` may replace the lab's facts."""
    return lab.store.cell(lab.facts | key, lambda: verdict(lab, make(), shots))


def ceilings(lab: Lab, draws: dict[int, list[Draw]]) -> list[Group]:
    """What real prints get, and their layouts filled with the source's colours."""
    colours = [scenes.COLOURS[name.split()[0]] for name in scenes.CLASSES]
    colours = torch.tensor(colours + list(scenes.BACKGROUNDS.values())) / 255
    ids = torch.stack([own.ids for own in lab.asked[1]])
    flat = colours[oracle()[ids]].movedim(-1, 1).float()
    real, groups = partial(_same, lab.asked[0] / 2 + 0.5), []
    for count, several in draws.items():  # their distance to a shot is what copies are told by
        key = {"method": REAL_PRINTS, "part": "ceiling", "shots": count}
        cells = [cell(lab, key | {"draw": own.number}, real, own.pixels) for own in several]
        groups.append(Group(REAL_PRINTS, count, None, cells, range(len(cells))))
    name = "oracle classes, flat colours"
    cells = [cell(lab, {"method": name, "part": "ceiling"}, partial(_same, flat))]
    return [*groups, Group(name, 0, None, cells)]


def _same(images: Tensor) -> Tensor:
    return images


def affinity_rows(
    lab: Lab, draws: list[Draw], rows: dict[str, Picks]
) -> dict[str, list[tuple[Draw, Tensor]]]:
    """The affinities that are compared: of every draw of the shots, by chance, and the best."""
    first = draws[0]
    chance = [(first, random_picks(first.found, seed)) for seed in range(lab.sizes.seeds)]
    picked = {name: [(own, picks(own.found)) for own in draws] for name, picks in rows.items()}
    return {"random": chance} | picked | {"oracle": [(first, oracle())]}


def training_free(
    lab: Lab,
    draws: dict[int, list[Draw]],
    rows: dict[str, Picks],
    right: Callable[[Tensor], int],
) -> list[Group]:
    """The source model with an affinity folded in, and nothing trained."""
    groups = ceilings(lab, draws)
    for count, own in draws.items():
        for name, several in affinity_rows(lab, own, rows).items():
            cells = [_free_cell(lab, name, count, draw, picks) for draw, picks in several]
            found = mean_right([picks for _, picks in several], right)
            numbers = [draw.number for draw, _ in several]
            groups.append(Group(name, count, found, cells, numbers))
    return groups


def _free_cell(lab: Lab, name: str, count: int, draw: Draw, picks: Tensor) -> dict:
    key = {"part": "training-free", "method": name, "shots": count, "picks": named(picks)}
    key["draw"] = draw.number
    return cell(lab, key, partial(_folded, lab, picks), draw.pixels)


def mean_right(several: list[Tensor], right: Callable[[Tensor], int]) -> int:
    """How many colours affinities have right."""
    return round(float(np.mean([right(picks) for picks in several])))


def _folded(lab: Lab, picks: Tensor) -> Tensor:
    """Images under an affinity; the same affinity from other shots draws the same ones."""

    def make() -> dict[str, np.ndarray]:
        unet = transferred(lab.host, TARGET, matrix_of(picks)).eval()
        images = drawn(lab, MapsPipeline(unet, lab.host.scheduler, TARGET))
        return {"images": (images * 255).round().byte().numpy()}

    found = lab.store.cell({"method": "images", "picks": named(picks)} | lab.facts, make)
    return torch.from_numpy(found["images"]).float() / 255
