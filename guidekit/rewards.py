"""Rewards of images by name, for methods that choose among noises and particles."""

from collections.abc import Callable

from torch import Tensor

Reward = Callable[[Tensor], Tensor]


def brightness(images: Tensor) -> Tensor:
    """Mean (B,) of images (B, 3, H, W) in [-1, 1]."""
    return images.mean((1, 2, 3))


def contrast(images: Tensor) -> Tensor:
    """Standard deviation (B,) of images (B, 3, H, W) in [-1, 1]."""
    return images.std((1, 2, 3))


REWARDS: dict[str, Reward] = {"brightness": brightness, "contrast": contrast}
