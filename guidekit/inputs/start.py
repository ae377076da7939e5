"""Where a run begins and which levels it goes through: steps, own timesteps or sigmas, an image.

Image to image is SDEdit: Meng et al. 2022 (arXiv:2108.01073), as diffusers' pipelines do it.
"""

import copy
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from guidekit.backbones.denoiser import Denoiser
from guidekit.backbones.schedulers import lay_out_steps
from guidekit.errors import GuidekitError
from guidekit.images import fitted, to_uint8
from guidekit.noise import SOURCES
from guidekit.references import as_reference, to_pixels

STRENGTH = 0.8  # diffusers' default


@dataclass(frozen=True, eq=False)
class Start:
    """How the steps are laid out and what the first z is; noise over the scheduler's own steps.

    timesteps or sigmas: the levels, for schedulers whose `set_timesteps` takes them. latents:
    (B, C, h, w) in place of the first noise, of standard deviation 1, as diffusers' pipelines take
    them. image: a Tensor (3, H, W) or (B, 3, H, W) in [0, 1] of the run's size, or one that is
    fitted to it: an image or a path. strength: the share of the steps that is done from the image,
    more than 0, at most 1, default 0.8.

    Raises GuidekitError for options that exclude or need each other.
    """

    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    latents: Tensor | None = None
    image: Any = None
    strength: float | None = None

    def __post_init__(self):
        for one, other in (("timesteps", "sigmas"), ("latents", "image")):
            if None not in (getattr(self, one), getattr(self, other)):
                raise GuidekitError(f"{one} and {other} are both given; leave one of them out")
        if self.strength is not None and self.image is None:
            raise GuidekitError("strength is that of an image to begin with; give image too")
        if not 0 < (STRENGTH if self.strength is None else self.strength) <= 1:
            raise GuidekitError(f"strength is more than 0 and at most 1, not {self.strength}")
        for name, values in self._own.items():
            numbers = [float(value) for value in values]
            if not numbers or any(a <= b for a, b in itertools.pairwise(numbers)):
                raise GuidekitError(f"{name} must fall from the first to the last: {numbers[:5]}")

    @property
    def given(self) -> bool:
        """Whether the user said what the first z is."""
        return self.latents is not None or self.image is not None

    @property
    def _own(self) -> dict[str, Sequence[float]]:
        given = {"timesteps": self.timesteps, "sigmas": self.sigmas}
        return {name: values for name, values in given.items() if values is not None}

    def count(self, steps: int | None) -> int | None:
        """The number of steps that own timesteps or sigmas say, else `steps`.

        Raises GuidekitError where both are said.
        """
        for name, values in self._own.items():
            if steps is not None:
                raise GuidekitError(f"{name} and steps are both given; leave one of them out")
            return len(values)
        return steps

    def lay_out(
        self, denoiser: Denoiser, scheduler: SchedulerMixin, steps: int, shape: tuple[int, int, int]
    ) -> int:
        """Sets the scheduler's timesteps; the position of the first that is drawn.

        Raises GuidekitError for a scheduler that takes no own timesteps or sigmas, and for an image
        of which no step would be left.
        """
        for name in self._own:
            if not _takes(type(scheduler), name):
                known = [getattr(diffusers, known) for known in SOURCES]
                able = ", ".join(cls.__name__ for cls in known if _takes(cls, name))
                raise GuidekitError(f"{type(scheduler).__name__} takes no {name}; these do: {able}")
        own = {name: list(values) for name, values in self._own.items()}
        lay_out_steps(denoiser, scheduler, steps, shape, **own)
        first = self._skipped(steps) * scheduler.order
        if first >= len(scheduler.timesteps):
            raise GuidekitError(
                f"strength {self.strength or STRENGTH:g} of {steps} steps leaves none; raise one"
            )
        if hasattr(scheduler, "set_begin_index"):  # else it takes the second of two equal timesteps
            scheduler.set_begin_index(first)
        return first

    def _skipped(self, steps: int) -> int:
        """How many steps an image spares."""
        if self.image is None:
            return 0
        strength = STRENGTH if self.strength is None else self.strength
        return steps - min(int(steps * strength), steps)

    def check(self, denoiser: Denoiser, shape: tuple[int, int, int], count: int) -> None:
        """Raises GuidekitError for latents or an image of another shape than the run's."""
        shape = (count, *shape)
        if self.latents is not None and self.latents.shape != shape:
            raise GuidekitError(
                f"latents have shape {tuple(self.latents.shape)}; this run has {shape}"
            )
        if self.image is not None:
            self._pixels(denoiser, shape)

    def first(
        self,
        denoiser: Denoiser,
        scheduler: SchedulerMixin,
        timestep: Tensor,
        shape: tuple[int, int, int],
        generators: list[torch.Generator],
    ) -> Tensor:
        """The first z (B, C, h, w), at `timestep`; each image's noise from its own generator."""
        shape = (len(generators), *shape)
        place = {"device": denoiser.device, "dtype": denoiser.dtype}
        if self.image is None:
            drawn = self.latents is None
            z = randn_tensor(shape, generators, **place) if drawn else self.latents.to(**place)
            return z * getattr(scheduler, "init_noise_sigma", 1.0)
        pixels = self._pixels(denoiser, shape)
        x0 = denoiser.drawn_latents(pixels.to(**place), generators).to(**place)
        noise = randn_tensor(shape, generators, **place)
        times = timestep.reshape(1).repeat(len(x0))
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(x0, times, noise)
        return scheduler.add_noise(x0, noise, times)

    def _pixels(self, denoiser: Denoiser, shape: tuple[int, ...]) -> Tensor:
        """The image (B, 3, H, W) in [-1, 1] for latents of `shape` (B, C, h, w)."""
        size = (shape[2] * denoiser.factor, shape[3] * denoiser.factor)
        return _pixels(self.image, shape[0], size)


def own_copy(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A copy with the instance's own settings and tables, which a run may step.

    Raises GuidekitError for methods that were replaced on the instance: they would step the other.
    """
    given = vars(scheduler)
    replaced = [name for name in given if callable(given[name]) and _is_method(scheduler, name)]
    if mine := [name for name in replaced if not hasattr(given[name], "patch")]:
        raise GuidekitError(
            f"{', '.join(mine)} of the scheduler was replaced on the instance; make it a subclass, "
            "or use attach"
        )
    twin = copy.copy(scheduler)
    for name in replaced:  # what `attach` has put there
        del vars(twin)[name]
    return copy.deepcopy(twin)


def _is_method(scheduler: SchedulerMixin, name: str) -> bool:
    return inspect.isfunction(getattr(type(scheduler), name, None))


def _takes(cls: type, name: str) -> bool:
    """Whether `set_timesteps` has the argument."""
    return name in inspect.signature(cls.set_timesteps).parameters


def _pixels(image: Any, count: int, size: tuple[int, int]) -> Tensor:
    """Pixels (count, 3, H, W) in [-1, 1] of one image for all, or of one for each."""
    if not isinstance(image, Tensor):
        (shown,) = fitted(as_reference(image).image, size)
        image = (to_pixels(to_uint8(shown)) + 1) / 2
    image = image[None] if image.ndim == 3 else image
    if image.shape[1:] != (3, *size) or len(image) not in (1, count):
        raise GuidekitError(
            f"image has shape {tuple(image.shape)}; it is {(3, *size)} for all images, or "
            f"{(count, 3, *size)}"
        )
    return image.expand(count, -1, -1, -1) * 2 - 1
