"""`guidekit fit --kind readout`: a readout head from hundreds of pairs, which pass by in a stream.

Luo et al. 2024 (arXiv:2312.02150), section 3.1 and appendix: every batch is noised to a timestep of
its own, the frozen denoiser reads it, and AdamW moves the head. No feature is kept, so memory does
not grow with the pairs.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit.backbones.denoiser import Denoiser, frozen
from guidekit.errors import GuidekitError
from guidekit.heads.features import fixed_noise, noised, read_features
from guidekit.heads.pairs import Pairs
from guidekit.heads.readout import ReadoutHead, new_readout

SCALE_OF = 64  # pairs that say how large targets are
HELD_OUT = 0.1  # share of the pairs that are scored and not learned from
TIMESTEPS = (100, 500, 900)  # at which they are scored


@dataclass(kw_only=True)
class ReadoutOptions:
    """How a readout head is fitted."""

    sites: tuple[str, ...] = ()  # wildcards of blocks; none is the decoder's
    steps: int = 1000  # batches
    batch: int = 8
    rate: float = 1e-3  # of AdamW
    prompt: str = ""  # what a model that reads text is told
    seed: int = 0


@dataclass
class ReadoutReport:
    """What a fit did; scores are shares of the target's variance that are explained, held out."""

    pairs: int
    sites: tuple[str, ...]
    steps: int
    scores: dict[str, float]
    loss: float
    seconds: float


def fit_readout(
    denoiser: Denoiser,
    pairs: Pairs,
    options: ReadoutOptions | None = None,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[ReadoutHead, ReadoutReport]:
    """Fits a readout head on pairs; `tell` gets each step's number and loss.

    Raises GuidekitError for fewer than two pairs.
    """
    options, started = options or ReadoutOptions(), time.monotonic()
    if len(pairs) < 2:
        raise GuidekitError("a readout head needs two pairs at least, one to be scored on")
    held = set(range(0, len(pairs), max(round(1 / HELD_OUT), 2)))
    learned = [i for i in range(len(pairs)) if i not in held]
    grid = denoiser.latent_shape(None, None)[1:]
    first = torch.stack([pairs.batch([i], grid)[1][0] for i in learned[:SCALE_OF]])
    head = new_readout(denoiser, first.shape[1], options.sites, options.prompt)
    head.mean.copy_(_over_pixels(first, torch.nanmean))
    apart = (first - head.mean.cpu()[:, None, None]).square()
    head.std.copy_(_over_pixels(apart, torch.nanmean).sqrt().clamp(min=1e-6))
    with frozen(*denoiser.models):
        loss = _train(denoiser, head, pairs, learned, options, tell)
        scores = _scored(denoiser, head, pairs, sorted(held), options)
    head.config = dataclasses.replace(head.config, scores=scores)
    spent = time.monotonic() - started
    report = ReadoutReport(len(pairs), head.config.sites, options.steps, scores, loss, spent)
    return head.eval().requires_grad_(False), report


def _over_pixels(x: Tensor, reduce: Callable) -> Tensor:
    """A number for each channel of (B, D, h, w)."""
    return reduce(x.movedim(1, 0).flatten(1), 1)


def _train(
    denoiser: Denoiser,
    head: ReadoutHead,
    pairs: Pairs,
    numbers: list[int],
    options: ReadoutOptions,
    tell: Callable[[int, float], None],
) -> float:
    """Moves the head; the mean loss of the last tenth."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(head.parameters(), options.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    losses = []
    for step in range(options.steps):
        picked = torch.randint(len(numbers), (options.batch,), generator=generator).tolist()
        timestep = int(torch.randint(1, 1000, (), generator=generator))
        own = [numbers[i] for i in picked]
        maps, target = _read(denoiser, head, pairs, own, timestep, generator)
        with torch.enable_grad():
            loss = head.loss(head(maps, timestep), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        tell(step, losses[-1])
    last = losses[-max(len(losses) // 10, 1) :]
    return sum(last) / max(len(last), 1)


@torch.no_grad()
def _read(
    denoiser: Denoiser,
    head: ReadoutHead,
    pairs: Pairs,
    numbers: list[int],
    timestep: int,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of noised images, and their targets in the head's units."""
    images, targets = pairs.batch(numbers, head.config.grid)
    x0 = denoiser.latents(images.to(denoiser.device))
    if generator is None:
        eps = fixed_noise(numbers, tuple(x0.shape[1:]))
    else:
        eps = torch.randn(x0.shape, generator=generator)
    z = noised(denoiser, x0, timestep, eps)
    maps = read_features(denoiser, z, timestep, head.config.sites, head.config.prompt)
    return maps, head.standard(targets.to(denoiser.device))


@torch.no_grad()
def _scored(
    denoiser: Denoiser, head: ReadoutHead, pairs: Pairs, held: list[int], options: ReadoutOptions
) -> dict[str, float]:
    """The share of variance explained on held-out pairs, by timestep."""
    scores = {}
    for timestep in TIMESTEPS:
        missed = spread = 0.0
        for i in range(0, len(held), options.batch):
            maps, target = _read(denoiser, head, pairs, held[i : i + options.batch], timestep)
            missed += float(head.loss(head(maps, timestep), target).sum())
            spread += float(head.loss(torch.zeros_like(target), target).sum())
        scores[f"explained_at_{timestep}"] = 1 - missed / max(spread, 1e-12)
    return scores
