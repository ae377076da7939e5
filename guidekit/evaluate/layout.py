"""Layout: mIoU over the whole image and over labelled pixels, and presence, of many layouts."""

from dataclasses import dataclass, field

import numpy as np

from guidekit.evaluate.intervals import Statistic, difference, interval
from guidekit.evaluate.overlap import (
    CLASSES,
    FOUND,
    asked_pixels,
    mean_iou,
    overlaps,
    presence,
)


@dataclass
class LayoutCounts:
    """Pixels and objects of every layout, added as they come; images need not be kept."""

    classes: int = CLASSES
    #: Of an image that an object must cover to count as found.
    share: float = FOUND
    _parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, found: np.ndarray, wanted: np.ndarray) -> None:
        """Adds class maps (n, H, W) of what was seen and of what was asked, 0 for none."""
        full = overlaps(found, wanted, False, self.classes)
        labelled = overlaps(found, wanted, True, self.classes)
        asked = asked_pixels(wanted, self.classes)
        objects = presence(found, wanted, self.classes, self.share)
        self._parts.append((*full, *labelled, asked, *objects))

    @property
    def n(self) -> int:
        """Layouts so far."""
        return sum(len(part[0]) for part in self._parts)

    def statistics(self) -> dict[str, tuple[Statistic, int]]:
        """Every measure as a function of the indices of a resample, and of how many layouts."""
        columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        inter, union, labelled, labelled_union, asked, seen, objects = columns

        def iou(a: np.ndarray, b: np.ndarray) -> tuple[Statistic, int]:
            return lambda i: mean_iou(a[i], b[i], asked[i]), self.n

        found = {"mIoU": iou(inter, union), "mIoU labelled": iou(labelled, labelled_union)}
        groups = {"presence": objects > 0, "presence 1": objects == 1, "presence 2-3": objects > 1}
        for name, chosen in groups.items():
            if chosen.any():
                found[name] = _share(seen[chosen], objects[chosen]), int(chosen.sum())
        return found

    def row(self) -> dict[str, object]:
        """Every measure, with its 95% interval over layouts."""
        row: dict[str, object] = {}
        for name, (statistic, n) in self.statistics().items():
            row |= {name: statistic(np.arange(n)), f"{name} 95%": interval(statistic, n)}
        return row

    def against(self, other: "LayoutCounts") -> dict[str, object]:
        """Every measure minus another's of the same layouts, with intervals of the difference."""
        row: dict[str, object] = {}
        theirs = other.statistics()
        for name, (statistic, n) in self.statistics().items():
            row[name], row[f"{name} 95%"] = difference(statistic, theirs[name][0], n)
        return row


def _share(seen: np.ndarray, objects: np.ndarray) -> Statistic:
    return lambda i: float(seen[i].sum() / objects[i].sum())
