"""Where the trainers' scenes come from: the worlds that draw themselves, a folder of cut-outs."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.worlds import objects, prints, scenes

SOURCES = ("scenes", "dense", "prints", "cutouts")


class World(Protocol):
    """Scenes by number and split, their captions, images and class maps."""

    classes: tuple[str, ...]

    def scene(self, number: int, split: str = "train") -> Any:
        """The plan of a scene; it has `caption` and `things` with x, y in fractions."""

    def varied_caption(self, plan: Any, rng: np.random.Generator) -> str:
        """The scene's caption in one of many wordings."""

    def images(self, plans: list, size: int) -> Tensor:
        """Images `(B, 3, size, size)` in [-1, 1]."""

    def images_and_labels(self, plans: list, size: int) -> tuple[Tensor, Tensor]:
        """The same and their class maps `(B, size, size)`: 0 free, 1 + index in `classes`."""


class Shapes:
    """The world of `guidekit.worlds.scenes`."""

    classes, shapes = scenes.CLASSES, scenes.SHAPES

    def scene(self, number: int, split: str = "train") -> scenes.Scene:
        """Scene `number` of a split."""
        return scenes.scene(number, split)

    def varied_caption(self, plan: scenes.Scene, rng: np.random.Generator) -> str:
        """A wording of the scene."""
        from guidekit.train.text import varied_caption

        return varied_caption(plan, rng)

    def images(self, plans: list[scenes.Scene], size: int) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of scenes."""
        return scenes.batch(plans, size)[0]

    def images_and_labels(self, plans: list[scenes.Scene], size: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1], and the class of every pixel (B, H, W)."""
        labels = [torch.from_numpy(scenes.labels(plan, size)) for plan in plans]
        return self.images(plans, size), torch.stack(labels)


class Dense(Shapes):
    """The same scenes; backgrounds are classes too, so that no pixel is free."""

    classes = scenes.DENSE

    def images_and_labels(self, plans: list[scenes.Scene], size: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1], and the class of every pixel (B, H, W), from 1 on."""
        labels = [torch.from_numpy(scenes.dense_labels(plan, size)) for plan in plans]
        return self.images(plans, size), torch.stack(labels) + 1


class Prints:
    """The world of `guidekit.worlds.prints`, in which no pixel is free."""

    classes, shapes = prints.DENSE, prints.SHAPE_NAMES

    def scene(self, number: int, split: str = "train") -> scenes.Scene:
        """Scene `number` of a split."""
        return prints.scene(number, split)

    def varied_caption(self, plan: scenes.Scene, rng: np.random.Generator) -> str:
        """A wording of the scene, in the forms of `scenes`."""
        return SHAPES.varied_caption(plan, rng)

    def images(self, plans: list[scenes.Scene], size: int) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of scenes."""
        return self.images_and_labels(plans, size)[0]

    def images_and_labels(self, plans: list[scenes.Scene], size: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1], and the class of every pixel (B, H, W), from 1 on."""
        drawn = [prints.draw(plan, size) for plan in plans]
        images = torch.from_numpy(np.stack([image for image, _ in drawn]))
        labels = [prints.label_map(p, masks) for p, (_, masks) in zip(plans, drawn, strict=True)]
        return scenes.pixels(images), torch.from_numpy(np.stack(labels)) + 1


class Things(objects.World):
    """The world of a folder of cut-outs, as tensors."""

    def varied_caption(self, plan: objects.Scene, rng: np.random.Generator) -> str:
        """A wording of the scene."""
        return objects.varied_caption(plan, rng)

    def images(self, plans: list[objects.Scene], size: int) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of scenes."""
        images = np.stack([self.draw(plan, size)[0] for plan in plans])
        return scenes.pixels(torch.from_numpy(images))

    def images_and_labels(self, plans: list[objects.Scene], size: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1], and the class of every pixel (B, H, W)."""
        drawn = [self.draw(plan, size) for plan in plans]
        images = np.stack([image for image, _ in drawn])
        labels = [
            self.label_map(plan, masks) for plan, (_, masks) in zip(plans, drawn, strict=True)
        ]
        return scenes.pixels(torch.from_numpy(images)), torch.from_numpy(np.stack(labels))


SHAPES, DENSE, PRINTS = Shapes(), Dense(), Prints()
#: Worlds by name whose things are a colour and a shape; `dense` has the images of `scenes`.
COLOURED: dict[str, Shapes | Prints] = {"scenes": SHAPES, "prints": PRINTS}
_DRAWN: dict[str, World] = {**COLOURED, "dense": DENSE}
_things = cache(Things)  # its sprites serve every stage of a run


def source(options: Any) -> World:
    """The world that a stage's options name. Raises GuidekitError that says what is missing."""
    if options.source not in SOURCES:
        raise GuidekitError(f"source must be {' or '.join(SOURCES)}, not {options.source!r}")
    if options.source in _DRAWN:
        return _DRAWN[options.source]
    if not options.cutouts:
        raise GuidekitError(
            "this stage draws scenes of cut-outs; name their folder by --cutouts FOLDER. The "
            "built-in model's: npm pack @lobehub/fluent-emoji-3d && tar xf lobehub-*.tgz, then "
            "--cutouts package/assets"
        )
    return _things(Path(options.cutouts))


def with_cutouts(options: Any, folder: str | Path | None) -> Any:
    """A stage's options with the folder, where their source is cut-outs."""
    if folder is None or getattr(options, "source", "") != "cutouts":
        return options
    return dataclasses.replace(options, cutouts=str(folder))
