"""Captioned scenes of everyday things, composed from a folder of cut-outs.

A scene holds one to three things on one of ten grounds. Scene number i of a split is the same on
every machine and in every batch, so a training set needs no storage and a held-out split is a range
of numbers. Any folder of RGBA images is a world: `things.toml` in it names them.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guidekit.errors import GuidekitError
from guidekit.worlds.cutouts import Cutouts
from guidekit.worlds.grounds import GROUNDS, Grounds

SPLITS = {"train": 0, "test": 1, "judge": 2, "shots": 3, "tune": 4}
SIZES = {1: (0.40, 0.60), 2: (0.34, 0.50), 3: (0.30, 0.42)}  # longer side, by the number of things
SIZE_STEP = 0.02  # sizes and angles are few, so that every sprite is made once
ANGLES = (-15, -10, -5, 0, 5, 10, 15)  # degrees
MAX_OVERLAP = 0.08  # intersection of two square boxes over the smaller one
PLACEMENTS = 24  # positions tried for a thing before its size shrinks
JOINTS = (", ", " and ", " next to ", " with ", " beside ", " ")
OPENINGS = ("", "", "", "an image of ", "a photo of ", "an image of ", "there is ", "we see ")
TABLE = Path(__file__).with_name("objects.toml")


@dataclass(frozen=True)
class Thing:
    """One thing: its kind, centre and longer side in fractions of the image, angle in degrees."""

    kind: str
    x: float
    y: float
    size: float
    angle: int
    mirrored: bool

    @property
    def phrase(self) -> str:
        """The words that name the thing in a caption."""
        return self.kind


@dataclass(frozen=True)
class Scene:
    """Things from back to front on a ground; `number` and `split` say how it was drawn."""

    split: str
    number: int
    ground: str
    things: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        """`a cake, a glass and a lemon on a blue background`."""
        return caption([thing.phrase for thing in self.things], self.ground)


def caption(phrases: list[str], ground: str) -> str:
    """The sentence that scenes are captioned with, for the given things and ground."""
    *first, last = [with_article(phrase) for phrase in phrases]
    named = f"{', '.join(first)} and {last}" if first else last
    return f"{named} {GROUNDS[ground][0]}"


def varied_caption(plan: Scene, rng: np.random.Generator) -> str:
    """The scene's caption in one of many wordings: order, joints, opening, articles, ground."""
    if rng.random() < 0.4:
        return plan.caption
    phrases = [plan.things[i].phrase for i in rng.permutation(len(plan.things))]
    named = phrases if rng.random() < 0.3 else [with_article(phrase) for phrase in phrases]
    text = OPENINGS[rng.integers(len(OPENINGS))] + JOINTS[rng.integers(len(JOINTS))].join(named)
    if rng.random() < 0.3:
        return text
    wordings = GROUNDS[plan.ground]
    return f"{text} {wordings[rng.integers(len(wordings))]}"


def with_article(phrase: str) -> str:
    """`a cat`, `an apple`."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def read_things(folder: Path) -> dict[str, str]:
    """File names without ending to words: `things.toml` of the folder, or the built-in table."""
    own = folder / "things.toml"
    path = own if own.exists() else TABLE
    try:
        things = tomllib.loads(path.read_text(encoding="utf-8"))["things"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError) as error:
        raise GuidekitError(
            f'{path}: write a [things] table with lines such as "1f431" = "cat" ({error!r})'
        ) from None
    _check_names(things, path)
    return things


def _check_names(things: Mapping[str, str], path: Path) -> None:
    """ValueError unless all words are texts and no two cut-outs share theirs."""
    if not things or not all(isinstance(word, str) and word.strip() for word in things.values()):
        raise GuidekitError(f'{path}: [things] holds lines such as "1f431" = "cat"')
    words = list(things.values())
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise GuidekitError(f"{path}: give each cut-out its own words; twice: {', '.join(twice)}")


class World:
    """The scenes that a folder of cut-outs makes."""

    def __init__(self, folder: str | Path, things: Mapping[str, str] | None = None):
        """things: file names without ending to words; by default `read_things(folder)`."""
        self.cutouts = Cutouts(Path(folder), things or read_things(Path(folder)))
        self.classes = self.cutouts.kinds
        self.grounds = tuple(GROUNDS)
        self._grounds = Grounds()

    def scene(
        self, number: int, split: str = "train", objects: tuple[int, ...] = (1, 2, 3)
    ) -> Scene:
        """The plan of scene `number`; its things are of different kinds.

        Raises GuidekitError for a split that does not exist.
        """
        if split not in SPLITS:
            raise GuidekitError(f"no split {split!r}; splits are {', '.join(SPLITS)}")
        rng = np.random.Generator(np.random.Philox(key=[number, SPLITS[split]]))
        count = min(objects[int(rng.integers(len(objects)))], len(self.classes))
        ground = self.grounds[int(rng.integers(len(self.grounds)))]
        kinds = rng.choice(len(self.classes), count, replace=False)
        places = _places(rng, count)
        angles, mirrored = rng.choice(ANGLES, count).tolist(), (rng.random(count) < 0.5).tolist()
        things = (
            Thing(self.classes[kind], *place, angle, flip)
            for kind, place, angle, flip in zip(kinds, places, angles, mirrored, strict=True)
        )
        return Scene(split, number, ground, tuple(things))

    def draw(self, scene: Scene, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
        """Composes a scene.

        Returns the image `(size, size, 3)` uint8 and the masks `(things, size, size)` bool: the
        pixels where each thing is visible and covers at least half of the pixel.
        """
        rng = np.random.Generator(np.random.Philox(key=[scene.number, 1 << 32]))
        image = self._grounds.draw(scene.ground, size, rng)
        masks = np.zeros((len(scene.things), size, size), bool)
        for i, thing in enumerate(scene.things):
            sprite = self.cutouts.sprite(thing.kind, thing.angle, max(round(thing.size * size), 1))
            sprite = sprite.mirrored() if thing.mirrored else sprite
            rows, columns, seen = sprite.paste(image, thing.x * size, thing.y * size)
            masks[:i, rows, columns] &= ~seen
            masks[i, rows, columns] = seen
        return image.clip(0, 255).astype(np.uint8), masks

    def labels(self, scene: Scene, size: int = 128) -> np.ndarray:
        """Class map `(size, size)`: 0 where free, 1 + index in `classes` where a thing is seen."""
        return self.label_map(scene, self.draw(scene, size)[1])

    def label_map(self, scene: Scene, masks: np.ndarray) -> np.ndarray:
        """The class map of masks `(things, size, size)` that `draw` returned for the scene."""
        out = np.zeros(masks.shape[1:], np.int64)
        for thing, mask in zip(scene.things, masks, strict=True):
            out[mask] = 1 + self.classes.index(thing.kind)
        return out


def _places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Centres and sizes of square boxes that hardly overlap."""
    places: list[tuple[float, float, float]] = []
    smallest, largest = SIZES[count]
    while len(places) < count:
        size = SIZE_STEP * round(rng.uniform(smallest, largest) / SIZE_STEP)
        centres = rng.uniform(size / 2, 1 - size / 2, (PLACEMENTS, 2))
        free = centres[_free(centres, size, places)]
        if len(free):
            places.append((*map(float, free[0]), float(size)))
        else:
            largest = max(smallest, largest * 0.9)
    return places


def _free(centres: np.ndarray, size: float, places: list[tuple[float, float, float]]) -> np.ndarray:
    """Which centres `(n, 2)` let a box of the size stand clear of the places: `(n,)` bool."""
    free = np.ones(len(centres), bool)
    for *centre, side in places:
        shared = (size + side) / 2 - np.abs(centres - np.array(centre))
        shared = shared.clip(0, min(size, side))
        free &= shared.prod(1) <= MAX_OVERLAP * min(size, side) ** 2
    return free
