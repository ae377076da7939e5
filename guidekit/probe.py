"""The gains of one scheduler step, read off a copy of the scheduler that takes unit samples.

Every diffusers step is affine in the model's output, in fresh noise and in the samples it keeps,
with one number per step for each; a step on unit samples therefore reads all of them.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode

from guidekit.errors import GuidekitError


class Gains(NamedTuple):
    """Derivatives of the next z: by the output, the noise, a sample kept from an earlier call."""

    out: float
    noise: float
    stored: float


class Probe:
    """A copy of the scheduler just before one step; the caller may step the original meanwhile.

    Raises GuidekitError for a keyword of `step` whose effect on the gains is not known.
    """

    def __init__(self, scheduler: SchedulerMixin, timestep: Tensor | float, kwargs: dict[str, Any]):
        self._timestep = timestep.cpu() if isinstance(timestep, Tensor) else timestep
        self._kwargs = known_kwargs(kwargs)
        self._twin = _miniature(scheduler)

    def gains(self) -> Gains:
        """Gains of the step; ValueError where the scheduler itself makes no finite step."""
        with torch.no_grad(), _UnitNoise():
            ends = self._twin.step(_unit(0), self._timestep, _unit(), **self._kwargs).prev_sample
        gains = Gains(*ends.double().flatten().tolist())
        if not all(map(math.isfinite, gains)):
            raise GuidekitError(
                f"{type(self._twin).__name__} itself makes no finite step at timestep "
                f"{float(self._timestep):g}: start one step later (a = 0), or end above s = 0 "
                "(final_sigmas_type='sigma_min')"
            )
        return gains


class _UnitNoise(TorchFunctionMode):
    """Gives the noise row in place of random numbers, so that no generator moves."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.randn:
            return _unit(1)
        return func(*args, **(kwargs or {}))


def _unit(row: int = -1) -> Tensor:
    """Probe samples (3, 1, 1, 1), one in `row`, zero elsewhere; float64, as gains may cancel."""
    rows = [float(k == row) for k in range(3)]
    return torch.tensor(rows, dtype=torch.float64, device="cpu").view(3, 1, 1, 1)


def _miniature(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A copy of `scheduler` whose history is that of the probe rows, without clipping."""
    twin = copy.copy(scheduler)
    vars(twin).update({name: _shrink(name, value) for name, value in vars(scheduler).items()})
    wanted = {"clip_sample": False, "thresholding": False}
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        # The probe has no variance channels; the mean does not depend on them.
        wanted["variance_type"] = "fixed_small"
    twin.register_to_config(**{k: v for k, v in wanted.items() if k in scheduler.config})
    # DDPM reads an attribute too; Euler and LMS warn where scale_model_input was not called.
    wanted["is_scale_input_called"] = True
    vars(twin).update({k: v for k, v in wanted.items() if k in vars(twin)})
    return twin


def _shrink(name: str, value: Any) -> Any:
    """`value` of attribute `name` for the copy: tables as they are, history as probe rows."""
    if isinstance(value, Tensor):
        if value.ndim < 2:
            return value.cpu()
        return _unit(2 if name in ("sample", "last_sample", "cur_sample") else -1)
    if isinstance(value, list):  # step() appends to its lists in place
        return [_shrink(name, item) for item in value]
    return _miniature(value) if isinstance(value, SchedulerMixin) else value


def known_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `step` that set its gains; those that only carry noise are left out."""
    idle = ("generator", "variance_noise", "return_dict")
    known = ("eta", "use_clipped_model_output", "s_churn", "s_tmin", "s_tmax", "s_noise", "order")
    if unknown := sorted(set(kwargs) - {*idle, *known}):
        raise GuidekitError(f"Move does not know {unknown} of step(); it knows {[*idle, *known]}")
    return {name: value for name, value in kwargs.items() if name in known}
