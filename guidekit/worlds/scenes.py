"""Captioned scenes drawn from a seed: the world that the built-in models are trained and judged on.

A scene holds one to three objects, each one of 6 shapes in one of 8 colours, on one of 4
backgrounds. Scene number i of a split is the same on every machine and in every batch, so a
training set needs no storage and a held-out split is a range of numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guidekit.errors import GuidekitError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 220, 50),
    "green": (50, 160, 70),
    "cyan": (70, 205, 215),
    "blue": (40, 80, 200),
    "purple": (130, 50, 160),
    "pink": (245, 140, 190),
}
BACKGROUNDS = {
    "white": (238, 238, 238),
    "gray": (150, 150, 150),
    "brown": (110, 78, 52),
    "black": (28, 28, 28),
}
COLOUR_NAMES, BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)  # judge's 48 + free
#: Every pixel's class: the objects, then the backgrounds.
DENSE = (*CLASSES, *(f"{name} background" for name in BACKGROUND_NAMES))
SPLITS = {"train": 0, "test": 1, "judge": 2, "shots": 3}
MIN_SIZE, MAX_SIZE = 0.30, 0.55  # object's width over the image's side
MAX_OVERLAP = 0.12  # intersection of two bounding boxes over the smaller one
PLACEMENTS = 24  # positions tried per object before its size shrinks


@dataclass(frozen=True)
class Thing:
    """One object: names, centre and width in fractions of the side, rotation in radians."""

    shape: str
    colour: str
    x: float
    y: float
    size: float
    angle: float

    @property
    def phrase(self) -> str:
        """The words that name the object in the caption: `red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects from back to front on a background; `number` and `split` say how it was drawn."""

    split: str
    number: int
    background: str
    things: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        """`a red circle and a blue square on a white background`."""
        return caption([thing.phrase for thing in self.things], self.background)


def caption(phrases: list[str], background: str) -> str:
    """The sentence that scenes are captioned with, for the given objects and background."""
    named = [f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}" for phrase in phrases]
    return " and ".join(named) + f" on a {background} background"


def scene(number: int, split: str = "train", objects: tuple[int, ...] = (1, 2, 3)) -> Scene:
    """Draws the plan of scene `number`; every object of a scene has its own shape and colour pair.

    Raises GuidekitError for a split that does not exist.
    """
    if split not in SPLITS:
        raise GuidekitError(f"no split {split!r}; splits are {', '.join(SPLITS)}")
    rng = np.random.Generator(np.random.Philox(key=[number, SPLITS[split]]))
    count = objects[int(rng.integers(len(objects)))]
    background = BACKGROUND_NAMES[int(rng.integers(len(BACKGROUND_NAMES)))]
    kinds = rng.permutation(len(CLASSES))[:count]
    places = placements(rng, count)
    things = tuple(
        Thing(*reversed(CLASSES[kind].split()), *place)
        for kind, place in zip(kinds, places, strict=True)
    )
    return Scene(split, number, background, things)


def episode(number: int, size: int, split: str = "train") -> list[Scene]:
    """`size` scenes that share background and objects and differ in position, size and angle."""
    first = scene(number, split)
    scenes = []
    for i in range(size):
        rng = np.random.Generator(np.random.Philox(key=[number, SPLITS[split] + 16 * (i + 1)]))
        things = tuple(
            Thing(thing.shape, thing.colour, *place)
            for thing, place in zip(first.things, placements(rng, len(first.things)), strict=True)
        )
        scenes.append(Scene(split, number, first.background, things))
    return scenes


def placements(rng: np.random.Generator, count: int) -> list[tuple[float, float, float, float]]:
    """Centres, sizes and angles whose bounding boxes hardly overlap."""
    places: list[tuple[float, float, float, float]] = []
    largest = {1: MAX_SIZE, 2: 0.48, 3: 0.42}[count]
    while len(places) < count:
        size = rng.uniform(MIN_SIZE, largest)
        centres = rng.uniform(size / 2, 1 - size / 2, (PLACEMENTS, 2))
        free = [
            c for c in centres if all(_overlap(*c, size, *p[:3]) <= MAX_OVERLAP for p in places)
        ]
        if free:
            places.append((*map(float, free[0]), float(size), float(rng.uniform(-0.25, 0.25))))
        else:
            largest = max(MIN_SIZE, largest * 0.9)
    return places


def _overlap(x: float, y: float, size: float, x2: float, y2: float, size2: float) -> float:
    """Intersection of two square boxes over the area of the smaller one."""
    dx = min(x + size / 2, x2 + size2 / 2) - max(x - size / 2, x2 - size2 / 2)
    dy = min(y + size / 2, y2 + size2 / 2) - max(y - size / 2, y2 - size2 / 2)
    return max(dx, 0.0) * max(dy, 0.0) / min(size, size2) ** 2


Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Signed distances in units of the object's half width; u, v are the object's own coordinates.


def _circle(u, v):
    return np.hypot(u, v) - 1


def _square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) - 0.9


def _triangle(u, v):
    # Sides through the top (0, -1) and the base v = 0.8; slope 2 gives a base of 0.9.
    return np.maximum(v - 0.8, (2 * np.abs(u) - v - 1) / 5**0.5)


def _star(u, v):
    # Five points: fold the plane into one tenth of a turn and measure to the edge of the point.
    angle = np.arctan2(u, -v)
    folded = np.abs(np.mod(angle + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(u, v)
    tip, notch = (0.0, 1.08), (0.46 * np.sin(np.pi / 5), 0.46 * np.cos(np.pi / 5))
    edge = (notch[0] - tip[0], notch[1] - tip[1])
    px, py = radius * np.sin(folded) - tip[0], radius * np.cos(folded) - tip[1]
    return (py * edge[0] - px * edge[1]) / np.hypot(*edge)


def _cross(u, v):
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(a, b) - 0.34, np.maximum(a, b) - 1)


def _ring(u, v):
    return np.abs(np.hypot(u, v) - 0.74) - 0.26


#: Signed distance of each shape, by name.
DISTANCES = dict(zip(SHAPES, (_circle, _square, _triangle, _star, _cross, _ring), strict=True))


def draw(scene: Scene, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Renders a scene.

    Returns the image `(size, size, 3)` uint8 and the masks `(objects, size, size)` bool: the
    pixels where each object is visible and covers at least half of the pixel.
    """
    rng = np.random.Generator(np.random.Philox(key=[scene.number, 1 << 32]))
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background] + rng.normal(0, 3, 3)
    masks = np.zeros((len(scene.things), size, size), bool)
    for i, thing in enumerate(scene.things):
        rows, columns, share = cover(thing, size)
        tint = COLOURS[thing.colour] + rng.normal(0, 4, 3)
        patch = picture[rows, columns]
        patch += share[..., None] * (tint.astype(np.float32) - patch)
        seen = share >= 0.5
        masks[: i + 1, rows, columns] &= ~seen
        masks[i, rows, columns] |= seen
    return picture.clip(0, 255).astype(np.uint8), masks


def cover(
    thing: Thing, size: int, distances: Mapping[str, Distance] = DISTANCES
) -> tuple[slice, slice, np.ndarray]:
    """The window of pixels an object can touch and the share of each pixel that it covers.

    distances: the shapes' signed distances.
    """
    rows, columns, inside = depth(thing, size, distances)
    return rows, columns, np.clip(0.5 + inside, 0, 1)


def depth(
    thing: Thing, size: int, distances: Mapping[str, Distance] = DISTANCES
) -> tuple[slice, slice, np.ndarray]:
    """The window of pixels an object can touch and how many pixels deep each is inside of it."""
    half, reach = thing.size * size / 2, thing.size * size * 0.75 + 1
    cx, cy = thing.x * size, thing.y * size
    rows = slice(max(int(cy - reach), 0), min(int(cy + reach) + 1, size))
    columns = slice(max(int(cx - reach), 0), min(int(cx + reach) + 1, size))
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - cy)[:, None] / half
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - cx)[None] / half
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    distance = distances[thing.shape](cos * x + sin * y, cos * y - sin * x)
    return rows, columns, -distance * half


def batch(scenes: list[Scene], size: int = 64) -> tuple[Tensor, list[str]]:
    """Images `(B, 3, size, size)` in [-1, 1] and their captions."""
    pictures = np.stack([draw(s, size)[0] for s in scenes])
    return pixels(torch.from_numpy(pictures)), [s.caption for s in scenes]


def pixels(pictures: Tensor) -> Tensor:
    """uint8 `(B, H, W, 3)` to float `(B, 3, H, W)` in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def labels(scene: Scene, size: int = 64) -> np.ndarray:
    """Class map `(size, size)`: 0 where free, 1 + index in `CLASSES` where an object is seen."""
    _, masks = draw(scene, size)
    out = np.zeros((size, size), np.int64)
    for thing, mask in zip(scene.things, masks, strict=True):
        out[mask] = 1 + CLASSES.index(thing.phrase)
    return out


def dense_labels(scene: Scene, size: int = 64) -> np.ndarray:
    """Class map `(size, size)` of indices in `DENSE`."""
    ground = len(CLASSES) + BACKGROUND_NAMES.index(scene.background)
    found = labels(scene, size)
    return np.where(found > 0, found - 1, ground)
