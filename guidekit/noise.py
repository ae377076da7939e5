"""Noise levels: one view of every diffusers scheduler.

A scheduler carries z = a * x0 + s * eps. `Level` knows a and s, and reads x0, eps, v and score from
the model's output whatever it means. `levels.py` tabulates the levels and moves of a run.

VP: Ho et al. 2020 (arXiv:2006.11239); v: Salimans & Ho 2022 (arXiv:2202.00512); flow: Lipman et al.
2023 (arXiv:2210.02747); VE: Karras et al. 2022 (arXiv:2206.00364).
"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from guidekit.errors import GuidekitError

# A scheduler of diffusers; they share no typed interface beyond their config.
Scheduler: TypeAlias = Any
Kind = Literal["vp", "ve", "flow"]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]

# Below this a (in VP coordinates) 1/a turns any error of a gradient into a jump of x0.
MIN_A = 1e-3

PREDICTIONS: tuple[str, ...] = get_args(Prediction)

# Where a scheduler keeps its levels: "table" alphas_cumprod[timestep]; "ve" sigmas[index], a = 1;
# "alpha" sigmas[index] by _sigma_to_alpha_sigma_t; "flow" sigmas[index], a = 1 - sigma. A list and
# not a look at attributes: EDM and consistency schedulers have sigmas too, but precondition the
# output, and a wrong x0 would not show.
_STEMS = {
    "table": "DDPM DDPMParallel DDIM DDIMParallel CogVideoXDDIM PNDM LCM TCD",
    "ve": "EulerDiscrete EulerAncestralDiscrete LMSDiscrete HeunDiscrete KDPM2Discrete"
    " KDPM2AncestralDiscrete",
    "alpha": "DPMSolverMultistep DPMSolverSinglestep DEISMultistep UniPCMultistep SASolver",
    "flow": "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM",
}
SOURCES = {f"{stem}Scheduler": family for family in _STEMS for stem in _STEMS[family].split()}
# Those that step down by a fixed number of timesteps, wherever the next one is.
STRIDES = {f"{s}Scheduler" for s in ("DDIM", "DDIMParallel", "CogVideoXDDIM", "PNDM")}


@dataclass(frozen=True)
class Level:
    """The noise level of a carried sample z = a * x0 + s * eps.

    a, s: signal and noise coefficients (in "ve" a is 1 and s is sigma). prediction: what the
    model's output `out` means. Tensors are (B, C, H, W) or any one shape; results are float32, or
    float64 when an argument is.
    """

    a: float
    s: float
    kind: Kind
    prediction: Prediction

    @property
    def norm(self) -> float:
        """What `scale_model_input` divides z by: sqrt(a^2 + s^2), which is 1 for VP; 1 for flow."""
        return math.hypot(self.a, self.s) if self.kind == "ve" else 1.0

    @property
    def informative(self) -> bool:
        """Whether a is large enough to divide by: 1/a turns any error of a smaller one into x0."""
        return self.a / self.norm >= MIN_A

    @property
    def sigma(self) -> float:
        """Noise standard deviation in units of x0, s / a (Karras et al. 2022); inf at a = 0."""
        return self.s / self.a if self.a else math.inf

    @property
    def logsnr(self) -> float:
        """Log signal-to-noise ratio, 2 log(a / s); -inf at a = 0, inf at s = 0."""
        if not (self.a and self.s):
            return math.inf if self.a else -math.inf
        return -2 * math.log(self.sigma)

    def x0(self, out: Tensor, z: Tensor) -> Tensor:
        """Clean estimate (B, C, H, W) that `out` stands for (Ho et al. 2020, eq. 15).

        Raises GuidekitError at a = 0 for an epsilon prediction, which holds no x0 there.
        """
        out, z = wide(out, z)
        p, q = self.x0_weights()
        return p * z + q * out

    def eps(self, out: Tensor, z: Tensor) -> Tensor:
        """Noise estimate that `out` stands for at z. (B, C, H, W); ValueError at s = 0."""
        out, z = wide(out, z)
        p, q = self.eps_weights()
        return p * z + q * out

    def score(self, out: Tensor, z: Tensor) -> Tensor:
        """Score d log p(z) / dz = (a * x0 - z) / s^2. (B, C, H, W); ValueError at s = 0."""
        # -eps / s is the same, and also holds at a = 0.
        return self.eps(out, z) / -_nonzero(self.s, "score at s = 0", "read it one step earlier")

    def v(self, out: Tensor, z: Tensor) -> Tensor:
        """Velocity (a * eps - s * x0) / norm (Salimans & Ho 2022); flow: eps - x0.

        The latter is Lipman et al. 2023 with time toward noise, as in diffusers. Raises as `x0`.
        """
        x0, eps = self.x0(out, z), self.eps(out, z)
        return eps - x0 if self.kind == "flow" else (self.a * eps - self.s * x0) / self.norm

    def out_from_x0(self, x0: Tensor, z: Tensor) -> Tensor:
        """Output that stands for `x0` at z. (B, C, H, W); ValueError at s = 0, but for sample."""
        x0, z = wide(x0, z)
        if self.prediction == "sample":
            return x0
        s = _nonzero(self.s, f"{self.prediction} from x0 at s = 0", "stop one step earlier")
        if self.prediction == "epsilon":
            return (z - self.a * x0) / s
        p, q = self.x0_weights()
        return (x0 - p * z) / q

    def out_from_eps(self, eps: Tensor, z: Tensor) -> Tensor:
        """Output that stands for `eps` at z. (B, C, H, W); ValueError at a = 0, but for epsilon."""
        eps, z = wide(eps, z)
        p, q = self.eps_weights()
        q = _nonzero(q, f"{self.prediction} from eps at a = 0", "use out_from_x0")
        return (eps - p * z) / q

    def x0_weights(self) -> tuple[float, float]:
        """(p, q) of x0 = p * z + q * out."""
        if self.prediction == "epsilon":
            remedy = "use a v_prediction, sample or flow model, or start one step later"
            a = _nonzero(self.a, "x0 from epsilon at a = 0", remedy)
            return 1 / a, -self.s / a
        if self.prediction == "sample":
            return 0.0, 1.0
        if self.prediction == "flow_prediction":
            return 1.0, -self.s
        return self.a / self.norm**2, -self.s / self.norm

    def eps_weights(self) -> tuple[float, float]:
        """(p, q) of eps = p * z + q * out, with x0 put in and z = a * x0 + s * eps solved."""
        if self.prediction == "epsilon":
            return 0.0, 1.0
        if self.prediction == "sample":
            s = _nonzero(self.s, "eps from sample at s = 0", "stop one step earlier")
            return 1 / s, -self.a / s
        if self.prediction == "flow_prediction":
            return 1.0, self.a
        # diffusers reads x0 = a * z - s * v also where a + s = 1: then (1 - a^2) / s = 1 + a.
        p = 1 + self.a if self.kind == "flow" else self.s / self.norm**2
        return p, self.a / self.norm


def level(scheduler: Scheduler, timestep: Tensor | float, offset: int = 0) -> Level:
    """The level of the sample that `scheduler` is about to step from at `timestep`.

    offset: model calls further on in `scheduler.timesteps` (1: where the next call will be; past
    the last it is the final level). In two-stage solvers each stage is a call. The scheduler is
    only read. Raises GuidekitError for a scheduler, prediction type or timestep it does not know.
    """
    if _family(scheduler) == "table" and offset == 0:
        return _of_table(scheduler, float(scheduler.alphas_cumprod[int(timestep)]))
    index = position(scheduler, timestep) + offset
    second = not getattr(scheduler, "state_in_first_order", True) ^ bool(offset % 2)
    return level_at(scheduler, index, second)


def level_at(scheduler: Scheduler, index: int, second: bool = False) -> Level:
    """The level at position `index` of `scheduler.timesteps`; past the last it is the final one.

    second: the call is the second stage of a two-stage solver's step.
    """
    last = len(scheduler.timesteps)
    if not 0 <= index <= last:
        name = type(scheduler).__name__
        raise GuidekitError(
            f"{name} has levels 0 to {last}, not {index}: set_timesteps starts anew"
        )
    family = _family(scheduler)
    if family == "table":
        t = int(scheduler.timesteps[index]) if index < last else -1
        return _of_table(scheduler, _alpha_bar(scheduler, t))
    prediction, sigma = _prediction(scheduler, family), _sigma(scheduler, index, second)
    if family == "ve":
        return Level(1.0, float(sigma), "ve", prediction)
    if family == "flow":
        return Level(float(1 - sigma), float(sigma), "flow", prediction)
    a, s = scheduler._sigma_to_alpha_sigma_t(sigma)
    kind: Kind = "flow" if scheduler.config.get("use_flow_sigmas", False) else "vp"
    return Level(float(a), float(s), kind, prediction)


def landing(scheduler: Scheduler, index: int, call: int, second: bool = False) -> Level:
    """The level that the step at position `index` leads to, the run's call number `call`.

    It is that of the next position, but for DDIM and PNDM, which go a fixed stride down: with
    linspace spacing, or a trailing one whose number of steps does not divide the trained ones, the
    next call is told another level than the one that z is at.
    """
    if not any(cls.__name__ in STRIDES for cls in type(scheduler).__mro__):
        return level_at(scheduler, index + 1, second)
    t = int(scheduler.timesteps[index])
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    if hasattr(scheduler, "counter"):
        stride = _pndm_stride(scheduler, call, stride)
    return _of_table(scheduler, _alpha_bar(scheduler, t - stride))


def is_flow(scheduler: Scheduler) -> bool:
    """Whether the scheduler carries z = (1 - sigma) * x0 + sigma * eps, as flow models need it."""
    return _family(scheduler) == "flow" or bool(scheduler.config.get("use_flow_sigmas", False))


def _family(scheduler: Scheduler) -> str:
    """Where the scheduler keeps its levels, also for subclasses of a known class."""
    if scheduler.config.get("invert_sigmas", False):
        raise GuidekitError(
            "invert_sigmas counts noise from the other end, so that no level is what it says; "
            "use X.from_config(its config, invert_sigmas=False)"
        )
    for cls in type(scheduler).__mro__:
        if cls.__name__ in SOURCES:
            return SOURCES[cls.__name__]
    name, known = type(scheduler).__name__, ", ".join(SOURCES)
    raise GuidekitError(f"guidekit does not know {name}; use X.from_config(its config) of: {known}")


def _prediction(scheduler: Scheduler, family: str) -> Prediction:
    """What the model's output means to this scheduler."""
    if family == "flow":
        return "flow_prediction"
    name = scheduler.config.prediction_type
    name = "sample" if name == "original_sample" else name  # Euler's second name for it
    if name not in PREDICTIONS:
        raise GuidekitError(
            f"unknown prediction_type {name!r}; there are: {', '.join(PREDICTIONS)}"
        )
    if name == "flow_prediction" and not scheduler.config.get("use_flow_sigmas", False):
        raise GuidekitError("flow_prediction needs use_flow_sigmas=True; set it in from_config")
    return cast(Prediction, name)


def position(scheduler: Scheduler, timestep: Tensor | float) -> int:
    """Position of the coming call in `scheduler.timesteps`, found as step() does, not stored.

    Raises GuidekitError for a timestep that is not among them.
    """
    for name in ("step_index", "begin_index"):
        if (known := getattr(scheduler, name, None)) is not None:
            return int(known)
    found = (scheduler.timesteps.cpu() == torch.as_tensor(timestep).cpu()).nonzero().flatten()
    if len(found) == 0:
        t = float(timestep)
        raise GuidekitError(f"{t:g} is not in scheduler.timesteps: pass one, after set_timesteps")
    if (calls := getattr(scheduler, "counter", None)) is not None:  # PNDM repeats timesteps
        return calls if calls in found.tolist() else int(found[-1 if calls > 1 else 0])
    return int(found[min(1, len(found) - 1)])  # diffusers takes the second of two when it starts


def _of_table(scheduler: Scheduler, alpha_bar: float) -> Level:
    """The level of a scheduler that reads alphas_cumprod."""
    prediction = _prediction(scheduler, "table")
    return Level(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), "vp", prediction)


def _alpha_bar(scheduler: Scheduler, timestep: int) -> float:
    """alphas_cumprod at a timestep; the final one below 0."""
    if timestep < 0:
        return float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return float(scheduler.alphas_cumprod[timestep])


def _pndm_stride(scheduler: Scheduler, call: int, stride: int) -> int:
    """How many timesteps below its own a call of PNDM leads."""
    if not scheduler.config.skip_prk_steps and call < len(scheduler.prk_timesteps):
        return 0 if call % 2 else stride // 2
    return 0 if call == 1 else stride  # the second call does the first step again


def _sigma(scheduler: Scheduler, index: int, second: bool) -> Tensor:
    """The sigma of the model call at `index`, from the table that step() reads."""
    if second and hasattr(scheduler, "sigmas_interpol"):
        # The ancestral KDPM2 stores the midpoint beside its start, the other beside its end.
        return cast(Tensor, scheduler.sigmas_interpol[index - hasattr(scheduler, "sigmas_up")])
    return cast(Tensor, scheduler.sigmas[index])


def wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype, float32 or wider."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return [t.to(dtype) for t in tensors]


def _nonzero(value: float, what: str, remedy: str) -> float:
    """`value`, or ValueError where a division by it has no meaning."""
    if value == 0:
        raise GuidekitError(f"{what} is undefined: {remedy}")
    return value
