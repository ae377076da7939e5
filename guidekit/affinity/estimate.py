"""Estimates of an affinity: from a segmenter, from names, from features.

The paper names the three kinds of evidence and the vote over them; prompts, networks, how counts
are normalised, and ties are not known to us, so that what is written here is ours.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.affinity.matrix import ORDER, Affinity, Estimate
from guidekit.affinity.segmenters import Segmenter
from guidekit.affinity.shots import Shot, batch_of, seen
from guidekit.errors import GuidekitError
from guidekit.heads.data import soft_masks
from guidekit.labels import VOID, LabelSet

TEMPLATE = "{}"  # what is said of a class's name, the same on both sides
ALIKE = 1e-9  # a class this near to the mean of its side, against its own length, is that mean
Texts = Callable[[list[str]], Tensor]  # texts to embeddings (N, D)
Features = Callable[[Tensor], Tensor]  # pixels (3, H, W) in [-1, 1] to features (C, h, w)


def estimate(
    shots: Sequence[Shot],
    source: LabelSet,
    *,
    segmenter: Segmenter | None = None,
    texts: Texts | None = None,
    features: Features | None = None,
    source_shots: Sequence[Shot] = (),
    template: str = TEMPLATE,
    by_hand: Mapping[int, Tensor] | None = None,
    order: tuple[str, ...] = ORDER,
    by_kind: bool = True,
) -> Affinity:
    """The affinity of labelled images of a target to a source label set, by all that is given.

    segmenter: of source classes. texts: an encoder of names. features: those of an image, which are
    compared with the ones of `source_shots`, images labelled with source classes. by_hand, order,
    by_kind: as in `Affinity`. Raises GuidekitError where nothing is given to estimate from.
    """
    target = batch_of(shots, shots[0].map.labels, "the shots")[0].map.labels if shots else None
    if target is None:
        raise GuidekitError("there are no shots; give at least one image with its map")
    found: dict[str, Estimate] = {}
    if segmenter is not None:
        found["segmentation"] = by_segmentation(shots, segmenter, source)
    if features is not None:
        found["features"] = by_features(shots, source_shots, features, source)
    if texts is not None:
        found["text"] = by_text(texts, source, target, template)
    if not found and not by_hand:
        raise GuidekitError(
            "nothing to estimate from; give a segmenter (--segmenter), features (--features), "
            "texts (--text) or a mapping by hand (--hand)"
        )
    return Affinity(source, target, found, dict(by_hand or {}), order, by_kind)


def by_segmentation(shots: Sequence[Shot], segmenter: Segmenter, source: LabelSet) -> Estimate:
    """Pixels of each target class that a segmenter sees as each source class, by their shares.

    All shots together; what the segmenter sees as void counts for nothing. Shares say more than the
    most probable class of a pixel, which is often void for images unlike those that the segmenter
    knows. Raises GuidekitError for a segmenter of other classes than the source's.
    """
    if segmenter.labels.classes != source.classes:
        raise GuidekitError(
            f"the segmenter knows {segmenter.labels.name!r}, and the source is {source.name!r}; "
            "give a segmenter of the source's classes, or its label set as the source"
        )
    count, targets = len(source), len(shots[0].map.labels)
    counts = torch.zeros(count, targets, dtype=torch.float64)
    for shot in shots:
        shares = segmenter(shot.pixels)
        grid, ids = shares.shape[1:], shot.map.ids
        cell = ids.numel() / shares[0].numel()  # pixels
        for own in set(shot.map.present) - {VOID}:  # one at a time: maps may be large
            mask = F.interpolate((ids == own).float()[None, None], grid, mode="area")[0, 0]
            counts[:, own] += cell * (shares * mask).sum((1, 2), dtype=torch.float64)
    return Estimate(counts, seen(shots, targets), counts=True)


def by_text(texts: Texts, source: LabelSet, target: LabelSet, template: str = TEMPLATE) -> Estimate:
    """Cosines of the classes' names, each in the same template. A name without letters abstains."""
    if "{}" not in template:
        raise GuidekitError(f"the template {template!r} lacks {{}}, where the name goes")
    sides = []
    for labels in (source, target):
        embedded = texts([template.replace("{}", name) for name in labels.classes])
        sides.append(F.normalize(embedded.double(), dim=1))
    says = torch.tensor([any(c.isalpha() for c in name) for name in target.classes])
    return Estimate(sides[0] @ sides[1].T, says.double())


def by_features(
    shots: Sequence[Shot], source_shots: Sequence[Shot], features: Features, source: LabelSet
) -> Estimate:
    """Cosines of the classes' mean features, each side centred by the mean of its own classes.

    Classes whose mean is that of all of their side, as where only one is shown, say nothing; source
    classes that no source shot shows are never named. Raises GuidekitError for source shots of
    another label set than the source's.
    """
    batch_of(source_shots, source, "the source's shots (--source-shots)")
    (theirs, shown), (ours, asked) = (_class_means(own, features) for own in (source_shots, shots))
    cosines = F.normalize(theirs, dim=1) @ F.normalize(ours, dim=1).T
    return Estimate(cosines.masked_fill(shown[:, None] == 0, float("-inf")), asked)


def _class_means(shots: Sequence[Shot], features: Features) -> tuple[Tensor, Tensor]:
    """Centred mean features (N, D) of every class, and the pixels (N,) that they rest on.

    A cell of the features counts for a class by the class's share of it. A class that nothing sets
    apart rests on none.
    """
    count = len(shots[0].map.labels)
    total, weight = torch.zeros(()), torch.zeros(count, dtype=torch.float64)
    for shot in shots:
        found = features(shot.pixels).double()
        shares = soft_masks(shot.map.ids[None], count, found.shape[-2:])[0].double()
        total = total + torch.einsum("nhw,chw->nc", shares, found)
        weight += shares.sum((1, 2))
    means, there = total / weight.clamp(min=1e-12)[:, None], weight > 0
    centred = torch.where(there[:, None], means - means[there].mean(0), 0.0)
    apart = centred.norm(dim=1) > ALIKE * means.norm(dim=1)
    return centred, seen(shots, count) * apart
