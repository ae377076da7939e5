"""Rewards of images: a number each, and whether it may guide what it is asked about, or judges it.

What guided a run never judges it: a run notes the hashes of the weights that its rewards read, and
`guidekit eval` and `guidekit tune` refuse judges that have them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from guidekit.bases.named import named
from guidekit.errors import GuidekitError
from guidekit.system.weights import weight_hashes

RewardFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reward:
    """A function of images (B, 3, H, W) in [-1, 1] that gives (B,), higher being better.

    Raises GuidekitError for weights that are not there.
    """

    name: str
    of: RewardFunction
    #: "guides": methods may choose by it. "judges": it only measures, and a method refuses it.
    role: Literal["guides", "judges"] = "guides"
    #: Files or folders of safetensors that it reads.
    weights: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ("guides", "judges"):
            raise GuidekitError(f"reward {self.name}: role is guides or judges, not {self.role!r}")
        if lacking := [path for path in self.weights if not Path(path).exists()]:
            raise GuidekitError(f"reward {self.name}: no weights {lacking[0]}")

    def __call__(self, images: Tensor) -> Tensor:
        """Its numbers (B,)."""
        return self.of(images)

    @property
    def stated(self) -> str:
        """What run.json has for it."""
        return self.name

    @cached_property
    def hashes(self) -> frozenset[str]:
        """SHA-256 of its weights."""
        return frozenset().union(*(weight_hashes(Path(path)) for path in self.weights))


def brightness(images: Tensor) -> Tensor:
    """Mean (B,) of images (B, 3, H, W) in [-1, 1]."""
    return images.mean((1, 2, 3))


def contrast(images: Tensor) -> Tensor:
    """Standard deviation (B,) of images (B, 3, H, W) in [-1, 1]."""
    return images.std((1, 2, 3))


REWARDS = {r.name: r for r in (Reward("brightness", brightness), Reward("contrast", contrast))}


def as_reward(given: str | RewardFunction, where: str) -> Reward:
    """The reward of a name, of MODULE:NAME, or of a function; one of no role may guide and judge.

    where: the option, for messages. Raises GuidekitError for a text that names none.
    """
    found = named(given, where, REWARDS)
    if isinstance(found, Reward):
        return found
    return Reward(given if isinstance(given, str) else getattr(found, "__name__", "reward"), found)


def guiding(
    given: str | RewardFunction, name: str, note: Callable[[str, frozenset[str]], None]
) -> Reward:
    """The reward that the guidance `name` chooses by; `run.account.guided` notes its weights.

    Raises GuidekitError for one that judges.
    """
    reward = as_reward(given, f"the reward of {name}")
    if reward.role == "judges":
        raise GuidekitError(
            f"{name}: the reward {reward.name} judges, so it cannot guide; take another one, and "
            "let this one judge what comes of it"
        )
    note(name, reward.hashes)
    return reward


def rewarded(reward: RewardFunction, images: Tensor, name: str) -> Tensor:
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
