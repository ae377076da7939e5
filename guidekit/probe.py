"""The gains of every step of a run, read off a copy of the scheduler that draws unit samples.

Every diffusers step is affine in the model's output, in fresh noise and in the samples it keeps,
with one number per step for each. One run of a copy over unit samples therefore reads all of them:
row k has a unit in the output of call k, row n + k in its noise, row 2 n + k in the samples kept
before it. Meanwhile the denoiser holds eps: a row that has moved z by dz is given the output of the
same eps, so its x0 moves by dz / a and stays there in any exact solver. What a solver's history
takes back of a change of the output is thereby in what is left of the row at the end.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode

from guidekit.errors import GuidekitError
from guidekit.noise import Level

# Where schedulers keep the sample of an earlier call.
KEPT = ("sample", "last_sample", "cur_sample")


class Gains(NamedTuple):
    """Derivatives of one call: of the next z by output, noise and kept samples; of the last x0."""

    out: float  # of the next z, by the model's output
    noise: float  # of the next z, by the fresh noise
    stored: float  # of the next z, by a sample kept from an earlier call
    lasting: float  # of the last x0 by the model's output, the denoiser holding eps


def read_gains(
    twin: SchedulerMixin,
    levels: Sequence[Level],
    landings: Sequence[Level],
    start: int,
    kwargs: dict[str, Any],
) -> list[Gains]:
    """Gains of every call from position `start` on; `twin`, a `miniature`, is used up.

    levels: of z at each call; landings: where each call leads. What is not finite is NaN.
    """
    n = len(levels)
    z = torch.zeros(3 * n, 1, 1, 1, dtype=torch.float64)
    rows = torch.arange(n)
    found = torch.zeros(3, n, dtype=torch.float64)
    for k, (level, landing) in enumerate(zip(levels, landings, strict=True)):
        out = _same_eps(level, z) if k else z.clone()  # nothing has moved before the first call
        out[k] += 1
        for name in KEPT:
            if isinstance(kept := getattr(twin, name, None), Tensor):
                setattr(twin, name, kept + _unit(3 * n, 2 * n + k))
        with torch.no_grad(), _UnitNoise(3 * n, n + k):
            z = twin.step(out, twin.timesteps[start + k], z, **kwargs).prev_sample.double()
        found[:, k] = z[[k, n + k, 2 * n + k], 0, 0, 0]
        # The next call is told the next level, also where this one did not lead to it.
        told = levels[k + 1].a if k + 1 < n else 1.0
        z = z.nan_to_num(0.0, 0.0, 0.0) * (told / landing.a)
    lasting = z.flatten()[rows]
    return [Gains(*column) for column in torch.cat([found, lasting[None]]).T.tolist()]


def _same_eps(level: Level, dz: Tensor) -> Tensor:
    """Change of the output that keeps eps where z moves by dz (and x0 by dz / a)."""
    if level.prediction == "sample":
        return dz / level.a
    return level.out_from_eps(torch.zeros_like(dz), dz)


class _UnitNoise(TorchFunctionMode):
    """Gives a unit in one row in place of random numbers, so that no generator moves."""

    def __init__(self, rows: int, row: int):
        super().__init__()
        self._noise = _unit(rows, row)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.randn:
            return self._noise
        return func(*args, **(kwargs or {}))


def _unit(rows: int, row: int) -> Tensor:
    """Samples (rows, 1, 1, 1), one in `row`, zero elsewhere; float64, as gains may cancel."""
    noise = torch.zeros(rows, 1, 1, 1, dtype=torch.float64)
    noise[row] = 1.0
    return noise


def on_cpu(scheduler: Any) -> Any:
    """A copy of the scheduler, as set_timesteps left it, with its tables on the CPU."""
    twin = copy.copy(scheduler)
    moved = {k: v.cpu() for k, v in vars(scheduler).items() if isinstance(v, Tensor)}
    vars(twin).update(moved)
    return twin


def miniature(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A copy that can be stepped through on unit samples: tables on the CPU, no clipping."""
    twin = on_cpu(scheduler)
    for name, value in vars(twin).items():
        if isinstance(value, list):  # step() appends to its lists in place
            vars(twin)[name] = list(value)
        elif isinstance(value, SchedulerMixin):  # SASolver and UniPC may hold another
            vars(twin)[name] = miniature(value)
    wanted = {"clip_sample": False, "thresholding": False}
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        # The probe has no variance channels; the mean does not depend on them.
        wanted["variance_type"] = "fixed_small"
    twin.register_to_config(**{k: v for k, v in wanted.items() if k in scheduler.config})
    # DDPM reads an attribute too; Euler and LMS warn where scale_model_input was not called.
    wanted["is_scale_input_called"] = True
    vars(twin).update({k: v for k, v in wanted.items() if k in vars(twin)})
    return twin


def known_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `step` that set its gains; those that only carry noise are left out.

    Raises GuidekitError for a keyword whose effect on the gains is not known.
    """
    idle = ("generator", "variance_noise", "return_dict")
    known = ("eta", "use_clipped_model_output", "s_churn", "s_tmin", "s_tmax", "s_noise", "order")
    if unknown := sorted(set(kwargs) - {*idle, *known}):
        raise GuidekitError(f"Levels does not know {unknown} of step(); it knows {[*idle, *known]}")
    return {name: value for name, value in kwargs.items() if name in known}


def check_finite(gains: Gains, scheduler: SchedulerMixin, timestep: float) -> Gains:
    """The gains; GuidekitError where the scheduler itself makes no finite step."""
    if not all(map(math.isfinite, gains)):
        raise GuidekitError(
            f"{type(scheduler).__name__} itself makes no finite step at timestep {timestep:g}: "
            "start one step later (a = 0), or end above s = 0 (final_sigmas_type='sigma_min')"
        )
    return gains
