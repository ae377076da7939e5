"""What is measured of images drawn after others: attributes kept, distances, copies."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from guidekit.evaluate import judge as evaluate
from guidekit.train.judge import Judge
from guidekit.worlds import scenes

SIZE = 32
HELD_OUT = ("red circle", "blue square", "green star", "yellow ring", "pink cross", "cyan triangle")


@dataclass(frozen=True)
class PagesSeen:
    """Held-out pages: conditions and other images (n, 3, 32, 32) in [0, 1], and their plans."""

    plans: list[scenes.Scene]
    conditions: Tensor
    others: Tensor


def held_out(n: int, seed: int, unseen: bool) -> PagesSeen:
    """n test pages, with only objects that no training page held, or with none of them."""
    pages, number = [], 10_000 * seed
    while len(pages) < n:
        things = {t.phrase for t in scenes.scene(number, "test").things}
        if things <= set(HELD_OUT) if unseen else not things & set(HELD_OUT):
            pages.append(scenes.episode(number, 2, "test"))
        number += 1
    first, second = ((scenes.batch(list(p), SIZE)[0] + 1) / 2 for p in zip(*pages, strict=True))
    return PagesSeen([p[0] for p in pages], first, second)


def objects(verdict: evaluate.Verdict) -> list[set[str]]:
    """Names of the objects that the judge finds in each image."""
    shown = evaluate.shown(verdict.classes)
    return [{scenes.CLASSES[i] for i in np.flatnonzero(row)} for row in shown]


def backgrounds(images: Tensor, verdict: evaluate.Verdict) -> list[str]:
    """Nearest background colour of what the judge finds free."""
    colours = np.array(list(scenes.BACKGROUNDS.values()))
    found = []
    for image, classes in zip(images.permute(0, 2, 3, 1).numpy(), verdict.classes, strict=True):
        free = image[classes == 0]
        middle = np.median(free, 0) * 255 if len(free) else np.zeros(3)
        found.append(scenes.BACKGROUND_NAMES[((colours - middle) ** 2).sum(1).argmin()])
    return found


def all_kept(images: Tensor, verdict: evaluate.Verdict, plans: list[scenes.Scene]) -> np.ndarray:
    """Whether background and set of objects are exactly the page's, (n,) of 0 and 1."""
    asked = [({t.phrase for t in plan.things}, plan.background) for plan in plans]
    seen = zip(objects(verdict), backgrounds(images, verdict), strict=True)
    return np.array([found == page for found, page in zip(seen, asked, strict=True)], float)


def attributes(found: set[str], background: str) -> set[str]:
    """Background, and every colour and every shape of a set of objects, each by itself."""
    words = {word for name in found for word in name.split()}
    return words | {f"{background} background"}


def overlap(images: Tensor, verdict: evaluate.Verdict, plans: list[scenes.Scene]) -> np.ndarray:
    """Attributes that image and page share over all of either (Jaccard): (n,) from 0 to 1."""
    found = zip(objects(verdict), backgrounds(images, verdict), strict=True)
    pages = [attributes({t.phrase for t in plan.things}, plan.background) for plan in plans]
    pairs = zip((attributes(*one) for one in found), pages, strict=True)
    return np.array([len(a & b) / len(a | b) for a, b in pairs])


def distance(a: Tensor, b: Tensor) -> np.ndarray:
    """Root mean squared difference of images (n, 3, H, W) in [0, 1]: (n,)."""
    return (a - b).square().mean((1, 2, 3)).sqrt().numpy()


def measure(name: str, images: Tensor, pages: PagesSeen, judge: Judge) -> dict:
    """A row of what was measured, with intervals.

    All attributes kept, their overlap, Frechet distance, distance to the condition, copies.
    """
    verdict, real = evaluate.see(judge, images), evaluate.see(judge, pages.others)
    kept, far = all_kept(images, verdict, pages.plans), distance(images, pages.conditions)
    shared = overlap(images, verdict, pages.plans)
    near = np.quantile(distance(pages.others, pages.conditions), 0.01)
    copies = (far < near).astype(float)
    row = {"method": name, "n": len(images)}
    columns = {
        "kept": lambda i: float(kept[i].mean()),
        "overlap": lambda i: float(shared[i].mean()),
        "frechet": lambda i: evaluate.frechet(verdict.features[i], real.features[i]),
        "far": lambda i: float(far[i].mean()),
        "copies": lambda i: float(copies[i].mean()),
    }
    for column, statistic in columns.items():
        draws = 200 if column == "frechet" else 1000
        row[column] = statistic(np.arange(len(images)))
        row[f"{column}_interval"] = evaluate.interval(statistic, len(images), draws)
    return row
