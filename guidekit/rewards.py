"""Rewards of images by name, for methods that choose among noises and particles."""

from collections.abc import Callable

import torch
from torch import Tensor

from guidekit.errors import GuidekitError

Reward = Callable[[Tensor], Tensor]


def brightness(images: Tensor) -> Tensor:
    """Mean (B,) of images (B, 3, H, W) in [-1, 1]."""
    return images.mean((1, 2, 3))


def contrast(images: Tensor) -> Tensor:
    """Standard deviation (B,) of images (B, 3, H, W) in [-1, 1]."""
    return images.std((1, 2, 3))


def rewarded(reward: Reward, images: Tensor, name: str) -> Tensor:
    """Rewards (B,) of images (B, 3, H, W) in [-1, 1], for the guidance of that name.

    Raises GuidekitError for what is not one finite number per image.
    """
    found = reward(images)
    if found.shape != (len(images),) or not torch.isfinite(found).all():
        raise GuidekitError(
            f"the reward of {name} gives {found.tolist()}; it must give one finite number per "
            f"image, ({len(images)},)"
        )
    return found


REWARDS: dict[str, Reward] = {"brightness": brightness, "contrast": contrast}
