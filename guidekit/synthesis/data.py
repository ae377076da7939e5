"""Images with their label maps, to train on: a world that draws itself, or a folder of shots."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.affinity.shots import Shot, Shots, read_shots
from guidekit.backbones.control_images import check_shape
from guidekit.errors import GuidekitError
from guidekit.labels import LabelMap, LabelSet
from guidekit.train.worlds import DENSE, PRINTS, World
from guidekit.worlds import prints, scenes

SHOTS = "shots"
SOURCE_LABELS = LabelSet("scenes", scenes.DENSE, things=scenes.CLASSES)
PRINTS_LABELS = LabelSet("prints", prints.DENSE, things=prints.CLASSES)
#: Worlds in which every pixel has a class, and their label sets.
WORLDS: dict[str, tuple[World, LabelSet]] = {
    "dense": (DENSE, SOURCE_LABELS),
    "prints": (PRINTS, PRINTS_LABELS),
}
SOURCES = (*WORLDS, SHOTS)
Pairs = tuple[Tensor, Tensor]  # images (B, 3, H, W) in [-1, 1], one-hot maps (B, N, H, W)


class Examples(Protocol):
    """Where a training's images and maps come from."""

    labels: LabelSet

    def pairs(self, numbers: range, generator: torch.Generator) -> Pairs:
        """Images and maps of the numbers of a step's examples."""

    def captions(self, numbers: range) -> list[str]:
        """Texts of the numbers' images, empty where there are none."""

    def held_out(self) -> Pairs | None:
        """Those that are never trained on, by which a checkpoint is chosen; None for none."""

    def shown(self, count: int) -> tuple[Tensor, list[LabelMap]]:
        """Up to `count` images and maps for previews."""


class WorldExamples:
    """Scenes of a world, of which there is no end."""

    def __init__(self, name: str, size: int):
        (self.world, self.labels), self.size = WORLDS[name], size

    def pairs(self, numbers: Sequence[int], generator: torch.Generator) -> Pairs:
        """Images and maps of the scenes of these numbers."""
        pixels, maps = self._drawn(numbers, "train")
        return pixels, torch.stack([own.one_hot() for own in maps])

    def _drawn(self, numbers: Sequence[int], split: str) -> tuple[Tensor, list[LabelMap]]:
        plans = [self.world.scene(i, split) for i in numbers]
        pixels, classes = self.world.images_and_labels(plans, self.size)  # 0 is no class
        return pixels, [LabelMap(ids - 1, self.labels) for ids in classes]

    def captions(self, numbers: range) -> list[str]:
        """A wording of each scene."""
        plans = [self.world.scene(i) for i in numbers]
        return [self.world.varied_caption(p, np.random.default_rng(p.number)) for p in plans]

    def held_out(self) -> None:
        """None: no scene is seen twice."""

    def shown(self, count: int) -> tuple[Tensor, list[LabelMap]]:
        """Scenes of the test split."""
        return self._drawn(range(count), "test")


class ShotExamples:
    """A few labelled images, some of which are held out; mirrored at random if `flips`."""

    def __init__(
        self, shots: Sequence[Shot], labels: LabelSet, size: int, held_out: int, flips: bool
    ):
        if not 0 <= held_out < len(shots):
            raise GuidekitError(
                f"{held_out} of {len(shots)} shots held out leaves none to train on; hold out "
                f"fewer (held_out, at most {len(shots) - 1})"
            )
        self.labels, self.flips = labels, flips
        read = [_sized(shots, i, size) for i in range(len(shots))]
        self.pixels = torch.stack([pixels for pixels, _ in read])
        self.maps = [own for _, own in read]
        order = torch.randperm(len(shots), generator=torch.Generator().manual_seed(0)).tolist()
        self.kept, self.trained = sorted(order[:held_out]), sorted(order[held_out:])

    def pairs(self, numbers: range, generator: torch.Generator) -> Pairs:
        """Shots drawn at random, as many as there are numbers."""
        draws = torch.randint(len(self.trained), (len(numbers),), generator=generator)
        pixels, maps = self._rows([self.trained[i] for i in draws.tolist()])
        turned = torch.rand(len(numbers), 1, 1, 1, generator=generator) < 0.5 * self.flips
        return pixels.where(~turned, pixels.flip(-1)), maps.where(~turned, maps.flip(-1))

    def _rows(self, rows: list[int]) -> Pairs:
        return self.pixels[rows], torch.stack([self.maps[i].one_hot() for i in rows])

    def captions(self, numbers: range) -> list[str]:
        """None of them has one."""
        return [""] * len(numbers)

    def held_out(self) -> Pairs | None:
        """The shots that are never trained on."""
        return self._rows(self.kept) if self.kept else None

    def shown(self, count: int) -> tuple[Tensor, list[LabelMap]]:
        """Those that are held out, then others."""
        rows = (self.kept + self.trained)[:count]
        return self.pixels[rows], [self.maps[i] for i in rows]


def _sized(shots: Sequence[Shot], index: int, size: int) -> tuple[Tensor, LabelMap]:
    """A shot as a square; the map by nearest neighbour. Raises GuidekitError for other shapes."""
    shot, square = shots[index], (size, size)
    name = str(shots.pairs[index][0]) if isinstance(shots, Shots) else f"shot {index}"
    check_shape(*shot.pixels.shape[:0:-1], square, name, "crop it and its mask to that shape")
    pixels = F.interpolate(shot.pixels[None], square, mode="bilinear", antialias=True)
    return pixels[0], shot.map.resized(*square)


def make_examples(source: str, data: str, size: int, held_out: int, flips: bool) -> Examples:
    """The examples that a stage's options name. Raises GuidekitError that says what is missing."""
    if source in WORLDS:
        return WorldExamples(source, size)
    if source != SHOTS:
        raise GuidekitError(f"source must be {', '.join(SOURCES)}, not {source!r}")
    if not data:
        raise GuidekitError("this stage trains on shots; name their folder by `data`")
    shots = read_shots(data)
    return ShotExamples(shots, shots.labels, size, held_out, flips)
