"""Printed scenes: a second world of other colours, shapes and grounds, for transfer between worlds.

Things are prints: dark outlines, stripes, uneven tints. Four of the eight silhouettes are those of
`scenes`, no colour is. Scene number i of a split is the same on every machine and in every batch.
"""

import numpy as np

from guidekit.errors import GuidekitError
from guidekit.worlds.scenes import DISTANCES, SPLITS, Scene, Thing, depth, placements

COLOURS = {
    "crimson": (150, 30, 60),
    "gold": (205, 165, 60),
    "teal": (30, 125, 125),
    "navy": (30, 45, 105),
    "lime": (160, 210, 80),
    "magenta": (200, 60, 150),
    "rust": (165, 85, 40),
    "lavender": (170, 150, 215),
}
#: The colours of `scenes` that a person would take for each.
ACCEPTED = {
    "crimson": ("red",),
    "gold": ("yellow", "orange"),
    "teal": ("cyan", "green"),
    "navy": ("blue",),
    "lime": ("green", "yellow"),
    "magenta": ("pink", "purple"),
    "rust": ("orange", "red"),
    "lavender": ("purple", "pink"),
}
#: The shape of `scenes` that a silhouette is; the others are new.
SAME = {"disc": "circle", "box": "square", "plus": "cross", "hoop": "ring"}
GROUNDS = {
    "snow": (226, 230, 236),
    "stone": (138, 140, 134),
    "soil": (96, 70, 52),
    "night": (34, 36, 58),
}
GROUND_NAMES = tuple(GROUNDS)
CREAM, DARK = (240, 232, 210), (40, 32, 36)  # stripes of every other silhouette
OUTLINE, EDGE = (30, 26, 30), 1.2  # colour and width in pixels
PERIOD = 0.55  # of the stripes, in half widths of the thing
KEY = 1 << 20  # tells these scenes' draws from those of `scenes`


def _diamond(u, v):
    return (np.abs(u) + np.abs(v) - 1) / 2**0.5


def _hexagon(u, v):
    a, b = np.abs(u), np.abs(v)
    return np.maximum(a, a / 2 + b * 3**0.5 / 2) - 0.9


def _bar(u, v):
    return np.maximum(np.abs(u) - 1, np.abs(v) - 0.42)


def _arch(u, v):
    ring = np.abs(np.hypot(u, v - 0.5) - 0.9) - 0.3
    return np.maximum(ring, v - 0.5)


SHAPES = {name: DISTANCES[shape] for name, shape in SAME.items()} | {
    "diamond": _diamond,
    "hexagon": _hexagon,
    "bar": _bar,
    "arch": _arch,
}
SHAPE_NAMES = tuple(SHAPES)
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
#: Every pixel's class: the things, then the grounds.
DENSE = (*CLASSES, *GROUND_NAMES)


def scene(number: int, split: str = "train", objects: tuple[int, ...] = (1, 2, 3)) -> Scene:
    """The plan of scene `number`; its things are of different classes.

    Raises GuidekitError for a split that does not exist.
    """
    if split not in SPLITS:
        raise GuidekitError(f"no split {split!r}; splits are {', '.join(SPLITS)}")
    rng = np.random.Generator(np.random.Philox(key=[number, KEY + SPLITS[split]]))
    count = objects[int(rng.integers(len(objects)))]
    ground = GROUND_NAMES[int(rng.integers(len(GROUND_NAMES)))]
    kinds = rng.permutation(len(CLASSES))[:count]
    things = tuple(
        Thing(*reversed(CLASSES[kind].split()), *place)
        for kind, place in zip(kinds, placements(rng, count), strict=True)
    )
    return Scene(split, number, ground, things)


def draw(scene: Scene, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """The image `(size, size, 3)` uint8 and masks `(things, size, size)` bool as in `scenes`."""
    rng = np.random.Generator(np.random.Philox(key=[scene.number, (1 << 33) + SPLITS[scene.split]]))
    image = _ground(scene.background, size, rng)
    masks = np.zeros((len(scene.things), size, size), bool)
    for i, thing in enumerate(scene.things):
        rows, columns, inside = depth(thing, size, SHAPES)
        share, patch = np.clip(0.5 + inside, 0, 1), image[rows, columns]
        patch += share[..., None] * (_surface(thing, inside, rng) - patch)
        seen = share >= 0.5
        masks[: i + 1, rows, columns] &= ~seen
        masks[i, rows, columns] |= seen
    image += rng.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), masks


def _ground(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """The ground's colour, brighter to one side by 30%."""
    angle = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    slope = np.cos(angle) * across[None] + np.sin(angle) * across[:, None]
    return (np.array(GROUNDS[name], np.float32) * (1 + 0.3 * slope)[..., None]).astype(np.float32)


def _surface(thing: Thing, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colours (h, w, 3) of a thing in its window: a tint with stripes and a dark outline."""
    tint = np.array(COLOURS[thing.colour]) * rng.uniform(0.8, 1.2) + rng.normal(0, 10, 3)
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 1)
    rows, columns = np.indices(inside.shape)
    # The size in pixels follows from the window, which is as wide as the thing and its margin.
    along = (np.cos(angle) * columns + np.sin(angle) * rows) / max(inside.max() * 2, 2)
    striped = ((along / PERIOD + phase) % 1 < 0.3)[..., None]
    stripe = CREAM if SHAPE_NAMES.index(thing.shape) % 2 == 0 else DARK
    colours = np.where(striped, 0.5 * tint + 0.5 * np.array(stripe), tint)
    return np.where((inside < EDGE)[..., None], OUTLINE, colours).astype(np.float32)


def dense_labels(scene: Scene, size: int = 32) -> np.ndarray:
    """Class map `(size, size)` of indices in `DENSE`."""
    return label_map(scene, draw(scene, size)[1])


def label_map(scene: Scene, masks: np.ndarray) -> np.ndarray:
    """The class map of masks `(things, size, size)` that `draw` returned for the scene."""
    ground = len(CLASSES) + GROUND_NAMES.index(scene.background)
    out = np.full(masks.shape[1:], ground, np.int64)
    for thing, mask in zip(scene.things, masks, strict=True):
        out[mask] = CLASSES.index(thing.phrase)
    return out
