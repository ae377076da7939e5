"""Mask heads: the paper's 1x1-convolution network, and a linear one.

Graikos et al. 2023: three hidden layers of 64 channels with ReLU, cross-entropy, Adam at 5e-4,
batches of 4, 50 epochs, images flipped and with brightness 0.5 to 1.5 at random. Features are
computed once for each of a few such variants and read from disk.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from guidekit.heads.data import Examples, soft_masks
from guidekit.heads.head import Head, Readout
from guidekit.heads.linear import fit_linear, mean_iou

HIDDEN = (64, 64, 64)
BATCH, LR, EPOCHS = 4, 5e-4, 50
BRIGHTNESS = 0.5
LINEAR_ROWS = 12_000  # pixels that the linear head is fitted on


def varied(picture: Tensor, mask: Tensor, variant: int) -> tuple[Tensor, Tensor]:
    """Variant of an image (C, H, W) in [-1, 1] and its mask (H, W); number 0 is itself.

    Odd ones are flipped left to right; all but the first have another brightness.
    """
    if variant == 0:
        return picture, mask
    rng = np.random.default_rng(variant)
    factor = float(rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS))
    picture = ((picture + 1) * factor - 1).clamp(-1, 1)
    if variant % 2:
        return picture.flip(-1), mask.flip(-1)
    return picture, mask


class MaskRows:
    """Joined features and soft masks of all examples and variants, read from disk by batch."""

    def __init__(self, arrays: dict[str, np.ndarray], head: Head, examples: Examples, copies: int):
        self.arrays, self.head, self.examples, self.copies = arrays, head, examples, copies

    def features(self, index: Sequence[int], variants: Sequence[int]) -> list[dict[str, Tensor]]:
        """Maps by site for every timestep of some examples."""
        reading = self.head.config.reading
        rows = [i * self.copies + v for i, v in zip(index, variants, strict=True)]
        return [
            {s: torch.from_numpy(self.arrays[f"{t}.{s}"][rows]) for s in reading.sites}
            for t in reading.timesteps
        ]

    def masks(self, index: Sequence[int], variants: Sequence[int]) -> Tensor:
        """Shares (B, classes, h, w) of the same examples."""
        found = []
        for i, v in zip(index, variants, strict=True):
            mask = self.examples.masks(i)
            found.append(varied(mask[None], mask, v)[1])
        classes = len(self.examples.classes)
        return soft_masks(torch.stack(found), classes, self.head.config.grid)

    def parts(self, index: Sequence[int], variants: Sequence[int]) -> list[Tensor]:
        """Joined features (B, C, h, w), one for each readout of the head."""
        rows = self.features(index, variants)
        noised = self.head.config.reading.noised
        return [self.head.assembled([m]) for m in rows] if noised else [self.head.assembled(rows)]


def set_statistics(rows: MaskRows) -> None:
    """Mean and deviation of every channel over the examples as they are."""
    for place, readout in enumerate(rows.head.readouts):
        total, square, count = 0.0, 0.0, 0
        for i in range(len(rows.examples)):
            x = rows.parts([i], [0])[place][0].flatten(1).double()
            total, square = total + x.sum(1), square + (x**2).sum(1)
            count += x.shape[1]
        mean = total / count
        std = (square / count - mean**2).clamp(min=0).sqrt()
        readout.mean.copy_(mean)
        readout.std.copy_(std.clamp(min=float(0.1 * std.median()) + 1e-6))


def train_mlp(
    rows: MaskRows,
    epochs: int = EPOCHS,
    lr: float = LR,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    only: Sequence[int] | None = None,
) -> float:
    """Trains the head's readouts with the paper's settings; returns the last mean loss.

    only: the examples to use, all if None.
    """
    head, index = rows.head, list(range(len(rows.examples)) if only is None else only)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(head.readouts.parameters(), lr=lr)
    loss = torch.zeros(())
    for epoch in range(epochs):
        order = torch.randperm(len(index), generator=generator).tolist()
        for first in range(0, len(order), BATCH):
            part = [index[i] for i in order[first : first + BATCH]]
            variants = torch.randint(rows.copies, (len(part),), generator=generator).tolist()
            target = rows.masks(part, variants)
            logits = [
                readout(x)
                for readout, x in zip(head.readouts, rows.parts(part, variants), strict=True)
            ]
            loss = torch.stack([_pixel_loss(one, target) for one in logits]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if progress:
            progress(epoch, float(loss.detach()))
    return float(loss.detach())


def _pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the labelled pixels of logits and shares (B, classes, h, w)."""
    each = -(target * logits.log_softmax(1)).sum(1)
    return each.sum() / target.sum().clamp(min=1)


def train_linear(rows: MaskRows, seed: int = 0) -> list[dict]:
    """Fits linear readouts by logistic regression on some of the pixels; returns their scores.

    Images, not pixels, are held out in the cross-validation.
    """
    scores = []
    for place, readout in enumerate(rows.head.readouts):
        x, y, groups = sampled_pixels(rows, place, LINEAR_ROWS, seed)
        found = fit_linear(x, y, len(rows.examples.classes), groups=groups, seed=seed)
        put_linear(readout, found)
        scores.append(found.scores | {"strength": found.strength})
    return scores


def sampled_pixels(
    rows: MaskRows, place: int, limit: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (n, C), classes (n,) and the image (n,) of pixels drawn from every example.

    Of the same number from every image; cells without a majority class are left out.
    """
    rng, found = np.random.default_rng(seed), []
    each = max(1, limit // len(rows.examples))
    for i in range(len(rows.examples)):
        target = rows.masks([i], [0])[0].flatten(1)
        share, label = target.max(0)
        known = np.flatnonzero((share > 0.5).numpy())
        chosen = rng.choice(known, min(each, len(known)), replace=False)
        x = rows.parts([i], [0])[place][0].flatten(1)[:, chosen].T
        found.append((x.numpy(), label[chosen].numpy(), np.full(len(chosen), i)))
    x, y, groups = (np.concatenate(part) for part in zip(*found, strict=True))
    return x, y, groups


def put_linear(readout: Readout, found) -> None:
    """Writes a linear head's numbers into a readout of one layer."""
    last = readout.net[-1]
    last.weight.data.copy_(torch.from_numpy(found.weight)[..., None, None])
    last.bias.data.copy_(torch.from_numpy(found.bias))
    readout.mean.copy_(torch.from_numpy(found.mean))
    readout.std.copy_(torch.from_numpy(found.std))
    readout.temperature.fill_(found.temperature)


@torch.no_grad()
def head_iou(rows: MaskRows, only: Sequence[int]) -> float:
    """Mean IoU of the head on some examples, at the head's grid."""
    predicted, wanted = [], []
    for i in only:
        parts = rows.parts([i], [0])
        pairs = zip(rows.head.readouts, parts, strict=True)
        logits = torch.stack([readout(x) for readout, x in pairs]).mean(0)
        target = rows.masks([i], [0])
        known = (target.sum(1) > 0.5).flatten()
        predicted.append(logits.argmax(1).flatten()[known].numpy())
        wanted.append(target.argmax(1).flatten()[known].numpy())
    classes = range(len(rows.examples.classes))
    return mean_iou(np.concatenate(predicted), np.concatenate(wanted), classes)
