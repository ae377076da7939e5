"""The worlds whose held-out layouts `layout.py` measures on, each with its judge.

    python benchmarks/layout_worlds.py --cutouts FOLDER     writes objects.npz anew

`scenes` are drawn wherever they are needed. `objects` are composed from cut-outs, which are not
shipped: `objects.npz` beside this file holds captions and class maps of held-out layouts, and the
judge's features of real ones, so that only the ceilings need the cut-outs themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import torch
from torch import Tensor

from guidekit import Condition, GuidekitError, Segment
from guidekit.evaluate import judge as evaluate
from guidekit.evaluate import label_maps
from guidekit.train.judge import Judge
from guidekit.train.worlds import SHAPES, Things
from guidekit.worlds import objects, scenes

REFERENCE, REAL = 2000, 100_000  # real images for the distances, and the number of the first
TUNING = 10_000  # number of the first layout for choosing options, of which no table is made
STORE = Path(__file__).with_name("objects.npz")
KEPT = {0: 500, TUNING: 200}  # layouts in the store, by the number of the first


@dataclass(frozen=True)
class Layouts:
    """Held-out layouts: conditions, class maps (n, H, W), 0 where free, and what is behind."""

    conditions: list[Condition]
    wanted: np.ndarray
    #: Prompts of the grounds alone, MultiDiffusion's prompt 0.
    grounds: list[str]

    def on_grounds(self) -> list[Condition]:
        """The same layouts with the ground as the prompt."""
        pairs = zip(self.conditions, self.grounds, strict=True)
        return [Condition(ground, c.negative, c.segments) for c, ground in pairs]


class World(Protocol):
    """Where layouts come from, and who judges images of them."""

    judge: str
    classes: tuple[str, ...]
    size: int

    def layouts(self, n: int, first: int = 0) -> Layouts:
        """Layouts `first` to `first + n` of those held out."""

    def real(self, n: int, first: int = 0) -> Tensor:
        """Their real images (n, 3, size, size) in [0, 1]."""

    def features(self, judge: Judge) -> np.ndarray:
        """The judge's features (2000, d) of other real images."""


def layouts_of(
    labels: np.ndarray, captions: Sequence[str], names: Sequence[str], caption: Callable
) -> list[Condition]:
    """Conditions of class maps (n, H, W): a segment for every class of a map.

    caption(phrase, k): the prompt of one thing on the ground of layout k.
    """
    found = []
    for k, (classes, text) in enumerate(zip(labels, captions, strict=True)):
        segments = [
            Segment(
                names[number - 1],
                torch.from_numpy(classes == number).float(),
                prompt=caption(names[number - 1], k),
            )
            for number in np.unique(classes[classes > 0])
        ]
        found.append(Condition(text, segments=tuple(segments)))
    return found


class Scenes:
    """Coloured shapes, 64x64."""

    judge, classes, size = "scenes-judge", scenes.CLASSES, 64

    def layouts(self, n: int, first: int = 0) -> Layouts:
        """Layouts of the test split, by their number of objects."""
        plans = label_maps.held_out(n, first)
        wanted = np.stack([scenes.labels(plan, self.size) for plan in plans])
        captions, grounds = [p.caption for p in plans], [p.background for p in plans]
        alone = lambda phrase, k: scenes.caption([phrase], grounds[k])  # noqa: E731
        conditions = layouts_of(wanted, captions, scenes.CLASSES, alone)
        return Layouts(conditions, wanted, [f"a {ground} background" for ground in grounds])

    def real(self, n: int, first: int = 0) -> Tensor:
        """The scenes themselves."""
        return (SHAPES.images(label_maps.held_out(n, first), self.size) + 1) / 2

    def features(self, judge: Judge) -> np.ndarray:
        """Of scenes from number 100,000 on."""
        plans = [scenes.scene(REAL + i, "test") for i in range(REFERENCE)]
        return evaluate.see(judge, (SHAPES.images(plans, self.size) + 1) / 2).features


class Objects:
    """Everyday things, 128x128; cutouts: their folder, for real images."""

    judge, size = "objects-judge", 128

    def __init__(self, cutouts: str | Path = ""):
        self._cutouts = Path(cutouts) if cutouts else None
        self._store = np.load(STORE, allow_pickle=False)
        self.classes = tuple(self._store["classes"].tolist())

    def layouts(self, n: int, first: int = 0) -> Layouts:
        """Layouts of the store, by their number of things."""
        if n > KEPT.get(first, 0):
            there = ", ".join(f"{count} from {number}" for number, count in KEPT.items())
            raise GuidekitError(f"no {n} layouts from number {first}; {STORE.name} holds {there}")
        wanted, captions, grounds = (
            self._store[f"{name}-{first}"][:n] for name in ("labels", "captions", "grounds")
        )
        # Neighbours share a batch, and regions of a batch are padded to the most of it.
        order = np.argsort([len(np.unique(w)) for w in wanted], kind="stable")
        wanted, captions, grounds = wanted[order].astype(np.int64), captions[order], grounds[order]
        alone = lambda phrase, k: objects.caption([phrase], str(grounds[k]))  # noqa: E731
        conditions = layouts_of(wanted, captions.tolist(), self.classes, alone)
        behind = [objects.GROUNDS[str(ground)][0].removeprefix("on ") for ground in grounds]
        return Layouts(conditions, wanted, behind)

    def real(self, n: int, first: int = 0) -> Tensor:
        """The scenes themselves, in the order of their layouts."""
        if self._cutouts is None:
            raise GuidekitError("real images are composed from cut-outs; name them by --cutouts")
        world, counts = Things(self._cutouts), self._store[f"labels-{first}"][:n]
        order = np.argsort([len(np.unique(w)) for w in counts], kind="stable")
        plans = [world.scene(first + int(i), "test") for i in order]
        return (world.images(plans, self.size) + 1) / 2

    def features(self, judge: Judge) -> np.ndarray:
        """Those of the store, which are the shipped judge's."""
        return self._store["features"].astype(np.float64)


WORLDS = ("scenes", "objects")


def world_of(name: str, cutouts: str = "") -> World:
    """One of the worlds by its name."""
    return Objects(cutouts) if name == "objects" else Scenes()


def stored(cutouts: Path, size: int = Objects.size) -> dict[str, Any]:
    """What objects.npz holds of a folder of cut-outs."""
    world = Things(cutouts)
    found: dict[str, Any] = {"classes": np.array(world.classes)}
    for first, count in KEPT.items():
        plans = [world.scene(first + i, "test") for i in range(count)]
        labels = world.images_and_labels(plans, size)[1].numpy().astype(np.uint8)
        found |= {
            f"labels-{first}": labels,
            f"captions-{first}": np.array([plan.caption for plan in plans]),
            f"grounds-{first}": np.array([plan.ground for plan in plans]),
        }
    plans = [world.scene(REAL + i, "test") for i in range(REFERENCE)]
    judge, seen = evaluate.load_judge(Objects.judge), []
    for i in range(0, len(plans), 100):
        images = (world.images(plans[i : i + 100], size) + 1) / 2
        seen.append(evaluate.see(judge, images).features)
    return found | {"features": np.concatenate(seen).astype(np.float16)}


@click.command()
@click.option("--cutouts", required=True, type=click.Path(exists=True, path_type=Path))
def main(cutouts):
    """Writes objects.npz anew, after the judge was trained again."""
    np.savez_compressed(STORE, **stored(cutouts))
    click.echo(f"{STORE}: {STORE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
