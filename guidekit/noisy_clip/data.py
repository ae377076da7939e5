"""Images to train on: scenes, or any folder of images."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.images import read_image
from guidekit.seeds import shuffled
from guidekit.worlds import scenes

ALIKE = 4  # neighbours in a batch of scenes
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Scenes:
    """Scenes by number, which never repeat; four neighbours differ in shapes only."""

    def pictures(self, numbers: range, size: int, generator: torch.Generator) -> Tensor:
        """Images (B, 3, size, size) in [-1, 1]."""
        return scenes.batch([reshaped(i, ALIKE) for i in numbers], size)[0]

    def keys(self, numbers: range) -> Tensor:
        """What tells the images apart (B,)."""
        return torch.tensor(numbers)


def reshaped(number: int, alike: int) -> scenes.Scene:
    """Scene number // alike with its shapes moved on by number % alike."""
    return turned(scenes.scene(number // alike), scenes.SHAPES, number, number % alike)


def turned(plan: scenes.Scene, shapes: tuple[str, ...], number: int, by: int) -> scenes.Scene:
    """The plan under another number, its shapes moved on among those of its world.

    Without such neighbours colours and background tell a batch apart, and shapes are not learned.
    """
    things = tuple(
        replace(t, shape=shapes[(shapes.index(t.shape) + by) % len(shapes)]) for t in plan.things
    )
    return replace(plan, number=number, things=things)


class Folder:
    """All images below a folder, cut to squares and mirrored at random.

    Raises GuidekitError for a folder without images.
    """

    def __init__(self, path: str | Path):
        self.files = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.files:
            raise GuidekitError(
                f"data {str(path)!r} is neither 'scenes' nor a folder with images "
                f"({', '.join(SUFFIXES)})"
            )

    def pictures(self, numbers: range, size: int, generator: torch.Generator) -> Tensor:
        """Images (B, 3, size, size) in [-1, 1]; every file once before any comes again."""
        chosen = [self.files[i] for i in self.keys(numbers).tolist()]
        stack = torch.stack([read_image(path, (size, size)) for path in chosen])
        mirrored = torch.rand(len(stack), 1, 1, 1, generator=generator) < 0.5
        return torch.where(mirrored, stack.flip(-1), stack)

    def keys(self, numbers: range) -> Tensor:
        """What tells the images apart (B,): their places among the files."""
        count = len(self.files)
        return torch.tensor([shuffled(i % count, count, i // count) for i in numbers])


def open_data(name: str) -> Scenes | Folder:
    """`scenes`, or the folder of that name."""
    return Scenes() if name == "scenes" else Folder(name)
