"""Adaptive normalisation: scale and shift of every norm follow the noise level.

SDG (Liu et al., WACV 2023, arXiv:2112.05744) does it to the BatchNorms of CLIP's ResNet. Layers
that give scale and shift begin at zero, so that a changed network begins as it was.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from guidekit.errors import GuidekitError

# Norms of queries and keys see heads, or queries that belong to no image.
INNER = ("ln_q", "ln_k", "ln_inner", "q_norm", "k_norm")


class LevelEmbedding(nn.Module):
    """Vector (B, width) of log signal-to-noise ratios (B,), which may be infinite.

    Sinusoids of the angle atan(s / a), that is of the timestep of a cosine schedule.
    """

    def __init__(self, width: int, waves: int = 128):
        super().__init__()
        rates = 1000 * math.tau ** -torch.linspace(0, 4, waves // 2)
        self.register_buffer("rates", rates, persistent=False)
        self.layers = nn.Sequential(nn.Linear(waves, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, logsnr: Tensor) -> Tensor:
        """The vector, with an activation, as the layers of scale and shift take it."""
        angle = torch.atan(torch.exp(-logsnr / 2)) * (2 / math.pi)
        phase = angle[:, None] * self.rates
        return nn.functional.silu(self.layers(torch.cat([phase.sin(), phase.cos()], 1)))


class AdaptiveNorm(nn.Module):
    """A norm whose output is scaled and shifted per image; without an embedding the norm itself.

    It takes (B, C, h, w), or (B, ..., C) where the norm is over the last axis.
    """

    def __init__(self, norm: nn.BatchNorm2d | nn.LayerNorm, width: int):
        super().__init__()
        self.norm = norm
        self.axis = 1 if _over_channels(norm) else -1
        count = norm.num_features if isinstance(norm, nn.BatchNorm2d) else norm.normalized_shape[-1]
        self.gains = nn.Linear(width, 2 * count)
        nn.init.zeros_(self.gains.weight)
        nn.init.zeros_(self.gains.bias)
        self.embedding: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, scaled by 1 + scale and shifted."""
        y = self.norm(x)
        if self.embedding is None:
            return y
        shape = [len(y)] + [1] * (y.ndim - 1)
        shape[self.axis] = y.shape[self.axis]
        scale, shift = (part.reshape(shape) for part in self.gains(self.embedding).chunk(2, -1))
        return y * (1 + scale.to(y.dtype)) + shift.to(y.dtype)


def _over_channels(norm: nn.Module) -> bool:
    """Whether the norm's features are axis 1: BatchNorm, and timm's LayerNorms of maps."""
    return isinstance(norm, nn.BatchNorm2d) or "2d" in type(norm).__name__


def make_adaptive(network: nn.Module, width: int) -> list[AdaptiveNorm]:
    """Puts an AdaptiveNorm round every BatchNorm2d and LayerNorm of a network.

    Raises GuidekitError if it has neither.
    """
    made = []
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d | nn.LayerNorm) and name not in INNER:
                made.append(AdaptiveNorm(child, width))
                setattr(parent, name, made[-1])
    if not made:
        raise GuidekitError(f"{type(network).__name__} has no BatchNorm2d or LayerNorm to adapt")
    return made


@contextlib.contextmanager
def at_level(norms: list[AdaptiveNorm], embedding: Tensor) -> Iterator[None]:
    """The norms follow an embedding (B, width) for a while."""
    for norm in norms:
        norm.embedding = embedding
    try:
        yield
    finally:
        for norm in norms:
            norm.embedding = None
