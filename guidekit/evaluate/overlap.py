"""Do things stand where they should? Intersection over union of class maps, and presence."""

import numpy as np

from guidekit.worlds import scenes

CLASSES = len(scenes.CLASSES)  # of the built-in world
# An object counts as found where at least this share of the image is given its class; the
# smallest object, a ring of 0.3 of the side, covers 0.045.
FOUND = 0.015


def overlaps(
    found: np.ndarray, wanted: np.ndarray, labelled_only: bool = False, classes: int = CLASSES
) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union in pixels of every image and class, each (n, classes).

    found, wanted: class maps (n, H, W) of 0 for none, 1 to classes. labelled_only: pixels without a
    wanted object do not count, as in ZestGuide's evaluation; there an object may spill into free
    space at no cost.
    """
    if labelled_only:
        found = np.where(wanted > 0, found, 0)
    inter = asked_pixels(np.where(found == wanted, wanted, 0), classes)
    return inter, asked_pixels(found, classes) + asked_pixels(wanted, classes) - inter


def asked_pixels(wanted: np.ndarray, classes: int = CLASSES) -> np.ndarray:
    """Pixels of each class in class maps (n, H, W): (n, classes)."""
    counts = [np.bincount(image.ravel(), minlength=classes + 1)[1:] for image in wanted]
    return np.stack(counts)


def mean_iou(inter: np.ndarray, union: np.ndarray, asked: np.ndarray) -> float:
    """Mean over the classes asked for of summed intersection over summed union.

    inter, union: (n, classes); asked: (n, classes), pixels asked of each class.
    """
    present = asked.sum(0) > 0
    return float((inter.sum(0)[present] / np.maximum(union.sum(0)[present], 1)).mean())


def presence(
    found: np.ndarray, wanted: np.ndarray, classes: int = CLASSES, share: float = FOUND
) -> tuple[np.ndarray, np.ndarray]:
    """Objects found anywhere in the image, and objects asked for, of each image: (n,) each.

    share: of the image that an object must cover to count as found.
    """
    asked = asked_pixels(wanted, classes) > 0
    return (shown(found, classes, share) & asked).sum(1), asked.sum(1)


def shown(found: np.ndarray, classes: int = CLASSES, share: float = FOUND) -> np.ndarray:
    """Which classes (n, classes) cover at least that share of each image (n, H, W)."""
    return asked_pixels(found, classes) >= share * found.shape[1] * found.shape[2]
