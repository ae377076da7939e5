"""Scenes: masks from 20 pairs, masks in latents from 30, and an attribute from 50 and 50."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fewshot_baselines import train_segmenter
from fewshot_code import Code, trained_code
from fewshot_store import Store
from guidekit import Condition, Denoiser, Guidance, Sampling, load
from guidekit.evaluate import judge as evaluate
from guidekit.evaluate.intervals import over_trainings
from guidekit.heads import Examples, FitOptions, Head, fit
from guidekit.seeds import derived_seed
from guidekit.worlds import scenes
from guidekit.zoo.shipped import model_defaults
from guidekit_fewshot import Fewshot

SHAPES = ("background", *scenes.SHAPES)
PAPER = 25.0  # its scale; rows other than "ours, paper" have the model's tuned one
# The attribute does not depend on the place: one average of the features over the whole image.
RED = FitOptions(sites=("down_blocks.2", "up_blocks.0"), timesteps=(350,), pool=1)
MASK_ROWS = ("unguided", "ours, paper", "ours, detached")


def shape_maps(labels: np.ndarray) -> np.ndarray:
    """Class maps of 48 kinds to background and six shapes."""
    return np.where(labels > 0, (labels - 1) % len(scenes.SHAPES) + 1, 0)


def pairs(numbers: range, split: str, size: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, size, size) in [-1, 1] and shape maps (n, size, size)."""
    plans = [scenes.scene(i, split) for i in numbers]
    maps = np.stack([shape_maps(scenes.labels(plan, size)) for plan in plans])
    return scenes.batch(plans, size)[0], torch.from_numpy(maps)


def shape_iou(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean over the six shapes of summed intersection over summed union of maps (n, H, W)."""
    classes = len(scenes.SHAPES)
    asked = evaluate.asked_pixels(wanted, classes)
    return evaluate.mean_iou(*evaluate.overlaps(found, wanted, classes=classes), asked)


NOTHING = Condition()


@dataclass
class Scenes:
    """Model, judge and settings of the tables of scenes."""

    model: str
    store: Store
    per_draw: int
    draws: int = 5
    shots: int = 20
    steps: int = 50
    batch: int = 20
    seed: int = 0
    cfg: float | None = None
    scale: float | None = None  # None is the model's tuned one
    code_steps: int = 3000  # of the training of the row "latent code"

    @cached_property
    def code(self) -> Code:
        """The diffusion autoencoder of the scenes."""
        return trained_code("scenes", self.store.folder / "code-scenes", self.code_steps, 16)

    def __post_init__(self):
        if self.scale is None:
            self.scale = model_defaults(self.model)["plugin"]["fewshot"]["scale"]
        self.denoiser = Denoiser(load(self.model))
        self.judge = evaluate.load_judge()
        self.size = self.denoiser.latent_shape(None, None)[1] * self.denoiser.factor
        self.heads: dict[tuple, Head] = {}

    def see(self, images: Tensor) -> np.ndarray:
        """Shape maps that the judge sees in images (n, 3, H, W) in [0, 1]."""
        return shape_maps(evaluate.see(self.judge, images).classes)

    def head(self, method: str, draw: int) -> Head:
        """The mask head of a draw of the pairs."""
        estimator = "linear" if "linear" in method else "mlp"
        key = (estimator, draw)
        if key not in self.heads:
            numbers = range(10_000 * draw, 10_000 * draw + self.shots)
            examples = Examples.of(*pairs(numbers, "shots", self.size), SHAPES, "masks")
            options = FitOptions(estimator=estimator)
            self.heads[key] = fit(self.denoiser, examples, options)[0]
        return self.heads[key]

    def run(self, guidances: list[Guidance], seeds: list[int], conditions=NOTHING) -> Sampling:
        """A finished run."""
        options = {"seeds": seeds, "steps": self.steps, "cfg": self.cfg}
        return Sampling(self.denoiser, conditions, guidances, **options).finish()

    def sample(self, guidances: list[Guidance], seeds: list[int], conditions=NOTHING) -> Tensor:
        """Images in [0, 1]."""
        return self.run(guidances, seeds, conditions).images

    def _key(self, method: str, draw: int) -> dict:
        return {
            "method": method,
            "draw": draw,
            "n": self.per_draw,
            "steps": self.steps,
            "seed": self.seed,
            "model": self.model,
            "shots": self.shots,
            "scale": self.scale,
        }

    def mask_cell(self, method: str, draw: int) -> dict[str, np.ndarray]:
        """Judged images of one method and one draw of the pairs."""
        return self.store.cell(self._key(method, draw), lambda: self._masked(method, draw))

    def _masked(self, method: str, draw: int) -> dict[str, np.ndarray]:
        first = draw * self.per_draw
        _, wanted = pairs(range(first, first + self.per_draw), "test", self.size)
        found = []
        for i in range(0, self.per_draw, self.batch):
            masks = wanted[i : i + self.batch]
            seeds = [derived_seed(self.seed, "masks", first + i + j) for j in range(len(masks))]
            if method == "unguided":
                images = self.sample([], seeds)
            else:
                conditions = [Condition(targets={"fewshot": mask}) for mask in masks]
                images = self.sample([self._guidance(method, draw)], seeds, conditions)
            found.append(self.see(images))
        return {"found": np.concatenate(found), "wanted": wanted.numpy()}

    def _guidance(self, method: str, draw: int) -> Fewshot:
        head = self.head(method, draw)
        folder = self.store.folder / "heads" / f"{id(head)}"
        head.save(folder)
        return Fewshot(head=folder, **self._fields(method))

    def _fields(self, method: str) -> dict:
        """Form and scale of a method: the paper's, or the model's tuned ones."""
        if "paper" in method:
            return {"form": "stopped", "scale": PAPER}
        return {"form": "detached", "scale": self.scale}

    def mask_rows(self, methods: tuple[str, ...] = MASK_ROWS) -> list[dict]:
        """mIoU of generated images with the masks that were asked for."""
        rows = []
        for method in methods:
            cells = [self.mask_cell(method, d) for d in range(self.draws)]
            row = {
                "model": self.model,
                "pairs": self.shots,
                "method": method,
                "n": sum(len(c["found"]) for c in cells),
            }
            row["mIoU"], row["mIoU 95%"] = over_trainings(
                lambda c: shape_iou(c["found"], c["wanted"]), cells
            )
            rows.append(row)
        for row in rows:
            row["over unguided"] = row["mIoU"] / max(rows[0]["mIoU"], 1e-9)
        return rows

    def segmentation_rows(self, count: int) -> list[dict]:
        """The heads' own mIoU on real scenes beside a segmenter trained on the same pairs."""
        real, wanted = pairs(range(50_000, 50_000 + count), "test", self.size)

        def head_maps(method: str, draw: int) -> np.ndarray:
            head = self.head(method, draw)
            parts = [head.predict(self.denoiser, p) for p in real.split(self.batch)]
            logits = torch.nn.functional.interpolate(torch.cat(parts), real.shape[-2:])
            return logits.argmax(1).numpy()

        @torch.no_grad()
        def segmenter_maps(model) -> np.ndarray:
            return torch.cat([model(p).argmax(1) for p in real.split(self.batch)]).numpy()

        def shots_of(draw: int) -> tuple[Tensor, Tensor]:
            numbers = range(10_000 * draw, 10_000 * draw + self.shots)
            return pairs(numbers, "shots", self.size)

        def trained(draw: int) -> np.ndarray:
            return segmenter_maps(train_segmenter(*shots_of(draw), len(SHAPES)))

        def by_code(draw: int) -> np.ndarray:
            return self.code.mask_maps(shots_of(draw), real, len(SHAPES))

        ways = {
            "head, paper": lambda d: head_maps("ours, paper", d),
            "head, linear": lambda d: head_maps("ours, linear head", d),
            "segmenter from scratch": trained,
            "latent code": by_code,
        }
        rows = []
        for method, maps in ways.items():
            cells = []
            for draw in range(self.draws):
                key = {
                    "method": method,
                    "draw": draw,
                    "real": count,
                    "model": self.model,
                    "shots": self.shots,
                }
                if method == "latent code":
                    key["code steps"] = self.code_steps
                cells.append(
                    self.store.cell(
                        key, lambda m=maps, d=draw: {"found": m(d), "wanted": wanted.numpy()}
                    )
                )
            row = {"pairs": self.shots, "method": method, "real scenes": count}
            row["mIoU"], row["mIoU 95%"] = over_trainings(
                lambda c: shape_iou(c["found"], c["wanted"]), cells, shared=True
            )
            rows.append(row)
        return rows

    def attribute_rows(self, positives: int = 50) -> list[dict]:
        """Share of generated images in which the judge sees something red."""
        rows = []
        for method in ("unguided", "ours, paper", "ours, detached", "ours, detached + accept"):
            cells = [self._attribute_cell(method, d, positives) for d in range(self.draws)]
            row = {
                "attribute": "has a red object",
                "positives": positives,
                "method": method,
                "n": sum(len(c["red"]) for c in cells),
            }
            row["rate"], row["rate 95%"] = over_trainings(lambda c: float(c["red"].mean()), cells)
            rows.append(row)
        return rows

    def _attribute_cell(self, method: str, draw: int, positives: int) -> dict[str, np.ndarray]:
        key = self._key(f"red, {method}", draw) | {"positives": positives}
        return self.store.cell(key, lambda: {"red": self._red(method, draw, positives)})

    def _red(self, method: str, draw: int, positives: int) -> np.ndarray:
        guidance, found = None, []
        if method != "unguided":
            head, _ = fit(self.denoiser, red_examples(draw, positives, self.size), RED)
            folder = head.save(self.store.folder / "heads" / f"red-{draw}")
            guidance = Fewshot(head=folder, label="red", **self._fields(method))
        left, tries = self.per_draw, 0
        while left > 0 and tries < 3 * self.per_draw:
            size = min(self.batch, left)
            seeds = [derived_seed(self.seed, "red", draw, tries + j) for j in range(size)]
            run = self.run([] if guidance is None else [guidance], seeds)
            images = run.images
            tries += size
            if method.endswith("accept"):
                images = images[run.guidances[0].accept(images)]
            if len(images):
                found.append(has_red(evaluate.see(self.judge, images).classes))
            left -= len(images)
        return np.concatenate(found)


def has_red(classes: np.ndarray) -> np.ndarray:
    """Whether a red object is seen in class maps (n, H, W): (n,) bool."""
    red = [1 + i for i, name in enumerate(scenes.CLASSES) if name.startswith("red ")]
    share = np.isin(classes, red).mean((1, 2))
    return share >= evaluate.FOUND


def red_examples(draw: int, each: int, size: int) -> Examples:
    """As many scenes with a red object as without one."""
    chosen: dict[bool, list[scenes.Scene]] = {False: [], True: []}
    number = 10_000 * draw + 5_000
    while min(map(len, chosen.values())) < each:
        plan = scenes.scene(number, "shots")
        number += 1
        red = any(thing.colour == "red" for thing in plan.things)
        if len(chosen[red]) < each:
            chosen[red].append(plan)
    plans = chosen[False] + chosen[True]
    targets = torch.tensor([0] * each + [1] * each)
    return Examples.of(scenes.batch(plans, size)[0], targets, ["none", "red"])
