"""Noise levels and transitions: one view of every diffusers scheduler.

A scheduler carries z = a * x0 + s * eps. `Level` knows a and s, and reads x0, eps, v and score from
the model's output whatever it means. `Move` is one `scheduler.step` not yet taken: it turns what a
guidance wants (a score, a mean, a shift of the next z) into a change of the output. There guidance
is right for every solver; a change of z after the step is lost or overshot by those that keep an
earlier sample or a history (Heun, KDPM2, UniPC, SASolver, DPM++).

VP: Ho et al. 2020 (arXiv:2006.11239); v: Salimans & Ho 2022 (arXiv:2202.00512); flow: Lipman et al.
2023 (arXiv:2210.02747); VE: Karras et al. 2022 (arXiv:2206.00364); guidance: Dhariwal & Nichol 2021
(arXiv:2105.05233), Algorithms 1 and 2.
"""

import math
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Literal, get_args

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from guidekit.errors import GuidekitError, NoPushError
from guidekit.probe import Gains, Probe

Kind = Literal["vp", "ve", "flow"]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]

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
FAMILIES = {f"{stem}Scheduler": family for family in _STEMS for stem in _STEMS[family].split()}


# Below this a (in VP coordinates) 1/a turns any error of a gradient into a jump of x0.
MIN_A = 1e-3
# Smaller gains, and noise below it, are rounding of the scheduler's fp32 tables.
TINY = 1e-7


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
        out, z = _wide(out, z)
        p, q = self._x0_weights()
        return p * z + q * out

    def eps(self, out: Tensor, z: Tensor) -> Tensor:
        """Noise estimate that `out` stands for at z. (B, C, H, W); ValueError at s = 0."""
        out, z = _wide(out, z)
        p, q = self._eps_weights()
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
        x0, z = _wide(x0, z)
        if self.prediction == "sample":
            return x0
        s = _nonzero(self.s, f"{self.prediction} from x0 at s = 0", "stop one step earlier")
        if self.prediction == "epsilon":
            return (z - self.a * x0) / s
        p, q = self._x0_weights()
        return (x0 - p * z) / q

    def out_from_eps(self, eps: Tensor, z: Tensor) -> Tensor:
        """Output that stands for `eps` at z. (B, C, H, W); ValueError at a = 0, but for epsilon."""
        eps, z = _wide(eps, z)
        p, q = self._eps_weights()
        q = _nonzero(q, f"{self.prediction} from eps at a = 0", "use out_from_x0")
        return (eps - p * z) / q

    def _x0_weights(self) -> tuple[float, float]:
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

    def _eps_weights(self) -> tuple[float, float]:
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


def level(scheduler: SchedulerMixin, timestep: Tensor | float, offset: int = 0) -> Level:
    """The level of the sample that `scheduler` is about to step from at `timestep`.

    offset: model calls further on in `scheduler.timesteps` (1: where the next call will be; past
    the last it is the final level). In two-stage solvers each stage is a call. The scheduler is
    only read. Raises GuidekitError for a scheduler, prediction type or timestep it does not know.
    """
    family = _family(scheduler)
    prediction = _prediction(scheduler, family)
    if family == "table":
        alpha_bar = _alpha_bar(scheduler, timestep, offset)
        return Level(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), "vp", prediction)
    sigma = _sigma(scheduler, timestep, offset)
    if family == "ve":
        return Level(1.0, float(sigma), "ve", prediction)
    if family == "flow":
        return Level(float(1 - sigma), float(sigma), "flow", prediction)
    a, s = scheduler._sigma_to_alpha_sigma_t(sigma)
    kind = "flow" if scheduler.config.get("use_flow_sigmas", False) else "vp"
    return Level(float(a), float(s), kind, prediction)


class Move:
    """One transition, made before `scheduler.step`: its changes are added to the model's output.

    timestep, z, step_kwargs: as `scheduler.step` will get them; z is (B, C, H, W) or packed
    (B, N, C). The scheduler is copied, never changed, and no random number is drawn. A change has
    the shape and dtype of the given tensor; the mathematics is float32 or better. variance: the
    output's further C channels where the scheduler reads a learned variance (DDPM); changes are for
    the first C. `level` is that of z; `fallback` says why `mean` did
    not do what its name says, or is None. Raises GuidekitError for a keyword of `step` whose effect
    is not known.

    Gains are those of the step without `clip_sample` and `thresholding`: where these saturate x0,
    a pixel moves less than asked, or not at all.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        timestep: Tensor | float,
        z: Tensor,
        step_kwargs: dict[str, Any] | None = None,
        variance: Tensor | None = None,
    ):
        if z.ndim < 2:
            raise GuidekitError(
                f"z has shape {tuple(z.shape)}; give it as (B, C, H, W) or (B, N, C)"
            )
        self.level = level(scheduler, timestep)
        self.fallback: str | None = None
        self._timestep = float(timestep)
        self._probe = Probe(scheduler, timestep, step_kwargs or {})
        self._learned = None if variance is None else _learned(scheduler, timestep, variance)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the fresh noise in the next z; 0 for a deterministic step.

        With learned variance (DDPM) it is the lower bound of the learned range, "fixed_small".
        """
        return abs(self._gains.noise)

    @property
    def reads_sample(self) -> bool:
        """Whether the step starts from the z it is given, as a first-order solver's does.

        False where it starts from a sample kept by an earlier call, which loses most of an edit of
        z: second stages of Heun, KDPM2, DPM++ 2S and PNDM, UniPC's corrector, SASolver.
        """
        return self._gains.stored == 0.0

    def score(self, grad: Tensor) -> Tensor:
        """Change of the output equivalent to eps' = eps - s * grad.

        grad: d log p(y | z) / dz for carried z (B, C, H, W), so d / d(model input) over
        `level.norm`. Dhariwal & Nichol 2021, Algorithm 2, in every parameterisation. Raises
        ValueError below a = 1e-3 (VP coordinates), where x0 would move by 1/a of any error.
        """
        if (a := self.level.a / self.level.norm) < MIN_A:
            raise NoPushError(
                f"score is unbounded at a = {a:.1e} (limit {MIN_A}): skip this step, or push with"
                " shift(delta), which stays finite"
            )
        gain = -self.level.s / self.level._eps_weights()[1]
        return (_wide(grad)[0] * gain).to(grad.dtype)

    def shift(self, delta: Tensor) -> Tensor:
        """Change of the output that moves the next z by `delta`, in units of the carried z.

        The step is affine in the output, one number per step, so the gain is read off a copy; it is
        finite at a = 0 too. delta: (B, C, H, W). Used by ZestGuide (Couairon et al. 2023) and DPS
        (Chung et al. 2023). Raises GuidekitError where the next z does not depend on the output.
        """
        gain = self._gains.out
        if abs(gain) < TINY:
            raise NoPushError(f"the step at timestep {self._timestep:g} does not read the output")
        return (_wide(delta)[0] / gain).to(delta.dtype)

    def mean(self, grad: Tensor, var: float | Tensor | None = None) -> Tensor:
        """Change of the output that moves the mean of the next z by var * grad.

        grad: d log p(y | z) / dz (B, C, H, W). var: variance in units of z^2 that broadcasts,
        default that of the step, learned or noise_std^2. Dhariwal & Nichol 2021, Algorithm 1; SDG
        (Liu et al. 2023). With many steps it leads to the posterior if they are fully ancestral
        (DDPM, eta = 1, Euler a); at 0 < eta < 1 noise_std^2 is too small for that. Without noise it
        is `score(grad)`, and `fallback` says so. Raises as `score` and `shift` do.
        """
        self.fallback = None
        if self.noise_std < TINY:
            self.fallback = f"score: no noise at timestep {self._timestep:g}"
            return self.score(grad)
        if var is None:
            var = self.noise_std**2 if self._learned is None else self._learned
        return self.shift(var * _wide(grad)[0]).to(grad.dtype)

    @cached_property
    def _gains(self) -> Gains:
        """Gains of the step; read on demand, as the caller may never need them."""
        return self._probe.gains()


def _learned(scheduler: SchedulerMixin, timestep: Tensor | float, variance: Tensor) -> Tensor:
    """Variance (B, C, H, W) of the fresh noise from the learned channels, as DDPM's step has it.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 15; "learned" is the variance itself.
    """
    found = scheduler._get_variance(int(timestep), predicted_variance=_wide(variance)[0])
    # diffusers keeps the logarithm of a learned range.
    return found.exp() if scheduler.config.variance_type == "learned_range" else found


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler carries z = (1 - sigma) * x0 + sigma * eps, as flow models need it."""
    return _family(scheduler) == "flow" or bool(scheduler.config.get("use_flow_sigmas", False))


def _family(scheduler: SchedulerMixin) -> str:
    """Where the scheduler keeps its levels, also for subclasses of a known class."""
    for cls in type(scheduler).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    name, known = type(scheduler).__name__, ", ".join(FAMILIES)
    raise GuidekitError(f"guidekit does not know {name}; use X.from_config(its config) of: {known}")


def _prediction(scheduler: SchedulerMixin, family: str) -> Prediction:
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
    return name


def _index(scheduler: SchedulerMixin, timestep: Tensor | float, offset: int) -> int:
    """Position in `scheduler.timesteps` of the call `offset` after the coming one."""
    index, last = _position(scheduler, timestep) + offset, len(scheduler.timesteps)
    if not 0 <= index <= last:
        name = type(scheduler).__name__
        raise GuidekitError(
            f"{name} has levels 0 to {last}, not {index}: set_timesteps starts anew"
        )
    return index


def _position(scheduler: SchedulerMixin, timestep: Tensor | float) -> int:
    """Position of the coming call in `scheduler.timesteps`, found as step() does, not stored."""
    for name in ("step_index", "begin_index"):
        if (known := getattr(scheduler, name, None)) is not None:
            return known
    found = (scheduler.timesteps.cpu() == torch.as_tensor(timestep).cpu()).nonzero().flatten()
    if len(found) == 0:
        t = float(timestep)
        raise GuidekitError(f"{t:g} is not in scheduler.timesteps: pass one, after set_timesteps")
    if (calls := getattr(scheduler, "counter", None)) is not None:  # PNDM repeats timesteps
        return calls if calls in found.tolist() else int(found[-1 if calls > 1 else 0])
    return int(found[min(1, len(found) - 1)])  # diffusers takes the second of two when it starts


def _alpha_bar(scheduler: SchedulerMixin, timestep: Tensor | float, offset: int) -> float:
    """alphas_cumprod at the call `offset` after `timestep`; the final one after the last call."""
    if offset == 0:
        return float(scheduler.alphas_cumprod[int(timestep)])
    index, steps = _index(scheduler, timestep, offset), scheduler.timesteps
    if index == len(steps):
        return float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return float(scheduler.alphas_cumprod[int(steps[index])])


def _sigma(scheduler: SchedulerMixin, timestep: Tensor | float, offset: int) -> Tensor:
    """The sigma of the model call `offset` after `timestep`, from the table that step() reads."""
    index = _index(scheduler, timestep, offset)
    second = not getattr(scheduler, "state_in_first_order", True) ^ bool(offset % 2)
    if second and hasattr(scheduler, "sigmas_interpol"):
        # The ancestral KDPM2 stores the midpoint beside its start, the other beside its end.
        return scheduler.sigmas_interpol[index - hasattr(scheduler, "sigmas_up")]
    return scheduler.sigmas[index]


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype, float32 or wider."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return [t.to(dtype) for t in tensors]


def _nonzero(value: float, what: str, remedy: str) -> float:
    """`value`, or ValueError where a division by it has no meaning."""
    if value == 0:
        raise GuidekitError(f"{what} is undefined: {remedy}")
    return value
