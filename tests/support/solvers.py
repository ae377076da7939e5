"""Every solver of diffusers that guidekit knows, on Gaussian data, whose posterior is known.

Data x0 ~ N(MU, C^2), observation y = x0 + N(0, R^2). With the exact model every step is affine in z
and in its noise, so a run is pushed through on unit rows: row 0 with no noise at all, row 1 with a
unit of initial noise, row 2 + k with a unit of the k-th draw. Row 0 is then the mean of what the
sampler draws and the summed squares of the others its variance: exact, without sampling error.
"""

import copy
import functools
import math
from typing import NamedTuple

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch.overrides import TorchFunctionMode

from guidekit.levels import Levels
from guidekit.noise import PREDICTIONS

diffusers.utils.logging.set_verbosity_error()
MU, C, Y, R = 0.7, 0.5, -0.4, 0.4
POST_VAR = 1 / (1 / C**2 + 1 / R**2)
POST_MEAN, POST_STD = POST_VAR * (MU / C**2 + Y / R**2), math.sqrt(POST_VAR)

EPS, V, SAMPLE, FLOW = PREDICTIONS
VP = (EPS, V, SAMPLE)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
KARRAS = dict(use_karras_sigmas=True)
AS_FLOW = dict(use_flow_sigmas=True, flow_shift=3.0)

# name: (class, options, step keywords, prediction types it takes, mean and std error at 50 steps).
# The errors are those of the 50-step discretisation (test_errors_are_of_the_steps), rounded up by
# less than 0.0005. They do not depend on the prediction type, except in PNDM, which mixes v of
# different levels.
CASES = {
    "ddpm": (DDPMScheduler, dict(clip_sample=False), {}, VP, 0.0002, 0.0475),
    "ddim": (
        DDIMScheduler,
        dict(clip_sample=False, set_alpha_to_one=False),
        {},
        VP,
        0.0010,
        0.0245,
    ),
    "ddim-eta1": (
        DDIMScheduler,
        dict(clip_sample=False, set_alpha_to_one=False),
        dict(eta=1.0),
        VP,
        0.0002,
        0.0455,
    ),
    "pndm": (PNDMScheduler, dict(skip_prk_steps=True), {}, (EPS, V), 0.0012, 0.0125),
    "pndm-prk": (PNDMScheduler, {}, {}, (EPS, V), 0.0012, 0.0125),
    "euler": (EulerDiscreteScheduler, {}, {}, VP, 0.0010, 0.0280),
    "euler-karras": (EulerDiscreteScheduler, KARRAS, {}, VP, 0.0010, 0.0130),
    "euler-a": (EulerAncestralDiscreteScheduler, {}, {}, (EPS, V), 0.0002, 0.0480),
    "lms": (LMSDiscreteScheduler, {}, {}, VP, 0.0010, 0.0010),
    "lms-karras": (LMSDiscreteScheduler, KARRAS, {}, VP, 0.0010, 0.0005),
    "heun": (HeunDiscreteScheduler, {}, {}, VP, 0.0010, 0.0005),
    "heun-karras": (HeunDiscreteScheduler, KARRAS, {}, VP, 0.0010, 0.0010),
    "kdpm2": (KDPM2DiscreteScheduler, {}, {}, (EPS, V), 0.0010, 0.0065),
    "kdpm2-karras": (KDPM2DiscreteScheduler, KARRAS, {}, (EPS, V), 0.0010, 0.0015),
    "kdpm2-a": (KDPM2AncestralDiscreteScheduler, {}, {}, (EPS, V), 0.0002, 0.0205),
    "kdpm2-a-karras": (KDPM2AncestralDiscreteScheduler, KARRAS, {}, (EPS, V), 0.0002, 0.0010),
    "deis": (DEISMultistepScheduler, {}, {}, VP, 0.0010, 0.0085),
    "dpm++2m": (DPMSolverMultistepScheduler, {}, {}, VP, 0.0010, 0.0255),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, KARRAS, {}, VP, 0.0010, 0.0005),
    "dpm++2m-sde": (
        DPMSolverMultistepScheduler,
        dict(algorithm_type="sde-dpmsolver++"),
        {},
        VP,
        0.0002,
        0.0240,
    ),
    "dpm++2s": (DPMSolverSinglestepScheduler, {}, {}, VP, 0.0010, 0.0305),
    "dpm++2s-karras": (DPMSolverSinglestepScheduler, KARRAS, {}, VP, 0.0010, 0.0025),
    "unipc": (UniPCMultistepScheduler, {}, {}, VP, 0.0010, 0.0255),
    "unipc-karras": (UniPCMultistepScheduler, KARRAS, {}, VP, 0.0010, 0.0010),
    "sasolver": (SASolverScheduler, {}, {}, VP, 0.0002, 0.0135),
    "flow-euler": (FlowMatchEulerDiscreteScheduler, dict(shift=3.0), {}, (FLOW,), 0.0015, 0.0260),
    "flow-heun": (FlowMatchHeunDiscreteScheduler, dict(shift=3.0), {}, (FLOW,), 0.0010, 0.0005),
    "flow-dpm++2m": (DPMSolverMultistepScheduler, AS_FLOW, {}, PREDICTIONS, 0.0015, 0.0010),
    "flow-dpm++2s": (DPMSolverSinglestepScheduler, AS_FLOW, {}, PREDICTIONS, 0.0015, 0.0140),
    "flow-unipc": (UniPCMultistepScheduler, AS_FLOW, {}, PREDICTIONS, 0.0010, 0.0015),
    "flow-deis": (DEISMultistepScheduler, AS_FLOW, {}, PREDICTIONS, 0.0005, 0.0120),
    "flow-sasolver": (SASolverScheduler, AS_FLOW, {}, PREDICTIONS, 0.0020, 0.0030),
}
# Steps that no posterior is to be expected of: few-step students, churn, and a level of a = 0.
OTHERS = {
    "ddim-zero-snr": (
        DDIMScheduler,
        dict(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        {},
        (V, SAMPLE),
    ),
    "ddim-eta.5": (DDIMScheduler, dict(clip_sample=False), dict(eta=0.5), (EPS,)),
    "ddpm-large": (DDPMScheduler, dict(clip_sample=False, variance_type="fixed_large"), {}, (EPS,)),
    "euler-churn": (EulerDiscreteScheduler, {}, dict(s_churn=5.0, s_noise=1.1), VP),
    "flow-euler-sde": (
        FlowMatchEulerDiscreteScheduler,
        dict(stochastic_sampling=True),
        {},
        (FLOW,),
    ),
    "lcm": (LCMScheduler, {}, {}, VP),
    "tcd": (TCDScheduler, {}, dict(eta=0.3), VP),
    "flow-lcm": (FlowMatchLCMScheduler, {}, {}, (FLOW,)),
    "unipc-3": (
        UniPCMultistepScheduler,
        dict(solver_order=3, predict_x0=False, final_sigmas_type="sigma_min"),
        {},
        (EPS,),
    ),
    "dpm-3": (DPMSolverMultistepScheduler, dict(solver_order=3), {}, (EPS,)),
    "dpm-3s": (DPMSolverSinglestepScheduler, dict(solver_order=3), {}, (EPS,)),
}
ALL = {**{name: case[:4] for name, case in CASES.items()}, **OTHERS}
PAIRS = [(name, p) for name in CASES for p in CASES[name][3]]
ALL_PAIRS = [(name, p) for name in ALL for p in ALL[name][3]]
# Those whose step also returns its x0; churned Euler adds noise to z before it reads x0.
RETURN_X0 = (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
# The level that these end at is the one of their last call, where the output is not read: DDIM and
# PNDM with set_alpha_to_one=False at t = 0, and flow DEIS, whose last two sigmas are the same
# (diffusers 0.42, as SASolver's, whose corrector still reads the output).
END_AS_THEY_ARE = ("ddim", "ddim-eta1", "pndm", "pndm-prk", "flow-deis")


@functools.cache  # KDPM2 takes 0.2 s to make
def prepared(name, prediction, steps):
    cls, options, _, _ = ALL[name]
    if not cls.__name__.startswith("FlowMatch"):
        options = {**BETAS, "prediction_type": prediction, **options}
    scheduler = cls(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def make(name, prediction, steps):
    return copy.deepcopy(prepared(name, prediction, steps)), ALL[name][2]


def posterior(at, z):
    """Mean and variance of x0 given z."""
    d = at.a**2 * C**2 + at.s**2
    return MU + at.a * C**2 * (z - at.a * MU) / d, C**2 * at.s**2 / d


def grad_log_y(at, z):
    """d log p(y | z) / dz, where y | z ~ N(mean of x0, var of x0 + R^2)."""
    x0, var = posterior(at, z)
    return (Y - x0) / (var + R**2) * at.a * C**2 / (at.a**2 * C**2 + at.s**2)


def scale(scheduler, z, timestep):
    return (
        scheduler.scale_model_input(z, timestep) if hasattr(scheduler, "scale_model_input") else z
    )


class UnitDraws(TorchFunctionMode):
    """The k-th random draw is one in row 2 + k and zero elsewhere."""

    def __init__(self):
        super().__init__()
        self.row = 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        self.row += 1
        noise = torch.zeros(args[0], dtype=torch.float64)
        noise[self.row] = 1
        return noise


class Call(NamedTuple):
    """One call of a run: what the scheduler is about to be given."""

    scheduler: SchedulerMixin
    levels: Levels
    index: int
    t: torch.Tensor
    z: torch.Tensor
    out: torch.Tensor
    kwargs: dict

    @property
    def at(self):
        return self.levels.at(self.index)

    @property
    def move(self):
        return self.levels.move(self.index)

    def step(self, out, z=None):
        """The next z, from a copy of the scheduler, always with the same noise."""
        z = self.z if z is None else z
        torch.manual_seed(2)
        twin = copy.deepcopy(self.scheduler)
        return twin.step(out, self.t, z, return_dict=False, **self.kwargs)[0].double()

    def moved(self, change):
        """How far a change of the output moves the next z."""
        return self.step(self.out + change) - self.step(self.out)


def law(name, prediction, push=None, steps=50):
    """Mean and std of the samples of a run with the exact model and `push(move, grad)`."""
    scheduler, kwargs = make(name, prediction, steps)
    levels = Levels(scheduler, kwargs)
    z = torch.zeros(len(levels) + 2, 1, 1, 1, dtype=torch.float64)
    z[1] = float(getattr(scheduler, "init_noise_sigma", 1.0))
    with UnitDraws():
        for k, t in enumerate(scheduler.timesteps):
            scale(scheduler, z, t)
            move = levels.move(k)
            out = move.level.out_from_x0(posterior(move.level, z)[0], z)
            if push:
                out = out + push(move, grad_log_y(move.level, z))
            z = scheduler.step(out, t, z, return_dict=False, **kwargs)[0]
    rows = z.flatten()
    return float(rows[0]), float((rows[1:] - rows[0]).norm())


def walk(name, prediction, steps=6, dtype=torch.float64):
    """A run on random tensors, call by call."""
    scheduler, kwargs = make(name, prediction, steps)
    levels = Levels(scheduler, kwargs)
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 4, 4, generator=rng, dtype=dtype)
    z = z * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for k, t in enumerate(scheduler.timesteps):
        scale(scheduler, z, t)
        out = torch.randn(z.shape, generator=rng, dtype=dtype)
        yield Call(scheduler, levels, k, t, z, out, kwargs)
        torch.manual_seed(1)
        z = scheduler.step(out, t, z, return_dict=False, **kwargs)[0].to(dtype)


def same(a, b):
    """Deep equality of scheduler attributes, bit for bit."""
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "shape"):
        return a.shape == b.shape and bool((a == b).all())
    return a is b if callable(a) else a == b
