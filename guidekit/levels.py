"""The levels and moves of a run, tabulated once on the CPU by the number of the denoiser call.

`Levels` knows where every call is and where it leads. A `Move` is one `scheduler.step` not yet
taken: it turns what a guidance wants (a score, a mean, a shift of the sample) into a change of the
model's output. There guidance is right for every solver; a change of z after the step is lost or
overshot by those that keep an earlier sample or a history (Heun, KDPM2, UniPC, SASolver, DPM++).

Guidance by score and mean: Dhariwal & Nichol 2021 (arXiv:2105.05233), Algorithms 1 and 2.
"""

from functools import cached_property
from typing import Any

from torch import Tensor

from guidekit.errors import GuidekitError, NoPushError
from guidekit.noise import MIN_A, Level, Scheduler, landing, level_at, position, wide
from guidekit.probe import Gains, check_finite, known_kwargs, miniature, on_cpu, read_gains

# Smaller gains, and noise below it, are rounding of the scheduler's fp32 tables.
TINY = 1e-7
# Where less than this share of a change of the output lasts, the history takes the rest back, and
# a push that makes up for it would throw z about in between.
MIN_LASTING = 0.2


class Levels:
    """Levels and moves of a run by `index`, the number of its denoiser call.

    scheduler: as `set_timesteps` leaves it, not yet stepped; its own tables count, not its config
    alone. It is only read, and no random number is drawn. step_kwargs: as `scheduler.step` will get
    them. start: position of the run's first call in `scheduler.timesteps`, by default where the
    scheduler itself would begin. Raises GuidekitError for a scheduler, a prediction type or a
    keyword of `step` that it does not know.

    Gains are those of steps without `clip_sample` and `thresholding`: where these saturate x0, a
    pixel moves less than asked, or not at all.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step_kwargs: dict[str, Any] | None = None,
        start: int | None = None,
    ):
        self._kwargs = known_kwargs(step_kwargs or {})
        self._tables: Scheduler = on_cpu(scheduler)
        self._twin = miniature(scheduler)
        if start is None:
            start = position(self._tables, self._tables.timesteps[0])
        self.start: int = start  # position of the first call in `scheduler.timesteps`
        #: The scheduler's timestep of every call.
        self.timesteps: list[float] = self._tables.timesteps[start:].tolist()
        #: The calls of every step of the solver: one each, or its stages.
        self.steps: list[range] = _steps(self._tables, start, len(self))
        self._step_of = [step for step in self.steps for _ in step]
        seconds = [k != step[0] for k, step in enumerate(self._step_of)] + [False]
        self._at = [level_at(self._tables, start + k, seconds[k]) for k in range(len(self))]
        self._next = [landing(self._tables, start + k, k, seconds[k + 1]) for k in range(len(self))]

    def __len__(self) -> int:
        """Number of denoiser calls."""
        return len(self.timesteps)

    def at(self, index: int) -> Level:
        """The level of z at call `index`, as the model and the scheduler take it."""
        return self._at[self._checked(index)]

    def next(self, index: int) -> Level:
        """The level that call `index` really leads to; that of the finished sample after the last.

        It differs from `at(index + 1)` where DDIM's or PNDM's fixed stride misses the next
        timestep (linspace spacing, or a trailing one that does not divide the trained steps).
        """
        return self._next[self._checked(index)]

    def step(self, index: int) -> range:
        """The calls of the solver's step that call `index` belongs to."""
        return self._step_of[self._checked(index)]

    def ends_step(self, index: int) -> bool:
        """Whether call `index` is the last stage of its step of the solver, where a shift lasts."""
        return index == self.step(index)[-1]

    def move(self, index: int, variance: Tensor | None = None) -> "Move":
        """The transition that call `index` makes.

        variance: the output's further C channels where the scheduler reads a learned variance
        (DDPM); changes are for the first C.
        """
        learned = None if variance is None else self._learned(self._checked(index), variance)
        return Move(self, index, learned)

    def gains(self, index: int) -> Gains:
        """Gains of call `index`; GuidekitError where the scheduler makes no finite step."""
        found = self._gains[self._checked(index)]
        return check_finite(found, self._tables, self.timesteps[index])

    @cached_property
    def _gains(self) -> list[Gains]:
        """Gains of all calls; read on demand, as a run may never need them."""
        return read_gains(self._twin, self._at, self._next, self.start, self._kwargs)

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            name = type(self._tables).__name__
            raise GuidekitError(f"this run of {name} has calls 0 to {len(self) - 1}, not {index}")
        return index

    def _learned(self, index: int, variance: Tensor) -> Tensor:
        """Variance (B, C, H, W) of the fresh noise from the learned channels, as DDPM's step has.

        Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 15; "learned" is the variance itself.
        """
        scheduler: Scheduler = self._tables
        (wider,) = wide(variance)
        found: Tensor = scheduler._get_variance(
            int(self.timesteps[index]), predicted_variance=wider
        )
        # diffusers keeps the logarithm of a learned range.
        return found.exp() if scheduler.config.variance_type == "learned_range" else found


class Move:
    """One transition, made before `scheduler.step`: its changes are added to the model's output.

    A change has the shape and dtype of the given tensor, (B, C, H, W) or packed (B, N, C); the
    mathematics is float32 or better. `fallback` says why `mean` did not do what its name says, or
    is None.
    """

    def __init__(self, levels: Levels, index: int, learned: Tensor | None = None):
        self._levels, self._index, self._learned = levels, index, learned
        #: The level of z.
        self.level = levels.at(index)
        self.fallback: str | None = None

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
        NoPushError below a = 1e-3 (VP coordinates), where x0 would move by 1/a of any error.
        """
        if not self.level.informative:
            a = self.level.a / self.level.norm
            raise NoPushError(
                f"score is unbounded at a = {a:.1e} (limit {MIN_A}): skip this step, or push with"
                " shift(delta), which stays finite"
            )
        gain = -self.level.s / self.level.eps_weights()[1]
        return (wide(grad)[0] * gain).to(grad.dtype)

    def shift(self, delta: Tensor, once: bool = False) -> Tensor:
        """Change of the output that moves the sample by `delta`, in units of the next z.

        delta (B, C, H, W) is what is left for good, per step of the solver: the x0 of the finished
        sample moves by delta / a of the next level while the denoiser holds eps, whatever a
        multistep solver's history takes back. With several stages a step it is pushed in the last
        one alone. once: the z that this call returns moves by delta, whatever becomes of it.

        Used by ZestGuide (Couairon et al. 2023); `once` by DPS (Chung et al. 2023). Finite at a = 0
        too. Raises NoPushError where the output does not move the sample, or not for good.
        """
        gain = self._gains.out if once else self._lasting()
        if abs(gain) < TINY:
            raise NoPushError(f"the step at timestep {self._timestep:g} does not read the output")
        return (wide(delta)[0] / gain).to(delta.dtype)

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
        return self.shift(var * wide(grad)[0], once=True).to(grad.dtype)

    def _lasting(self) -> float:
        """What a change of the output leaves for good, in units of the next z."""
        step = self._levels.step(self._index)
        if self._index != step[-1]:
            raise NoPushError(
                f"call {self._index} is stage {self._index - step[0] + 1} of {len(step)} of a step "
                "of the solver; a shift is pushed in the last one (acts_at = 'steps'), or with "
                "once=True"
            )
        now = self._gains.out
        lasting = self._gains.lasting * self._levels.next(self._index).a
        if abs(now) > TINY and lasting / now < MIN_LASTING:
            raise NoPushError(
                f"the solver's later steps take back {1 - lasting / now:.0%} of a change at "
                f"timestep {self._timestep:g}: end the pushes earlier, or use once=True"
            )
        return lasting

    @property
    def _timestep(self) -> float:
        return self._levels.timesteps[self._index]

    @cached_property
    def _gains(self) -> Gains:
        return self._levels.gains(self._index)


def _steps(scheduler: Scheduler, start: int, calls: int) -> list[range]:
    """The calls of every step of the solver."""
    firsts = [k for k in range(calls) if _begins_step(scheduler, start, k)]
    return [range(*pair) for pair in zip(firsts, [*firsts[1:], calls], strict=True)]


def _begins_step(scheduler: Scheduler, start: int, call: int) -> bool:
    """Whether a call starts from the sample it is given, and not from that of an earlier stage."""
    if hasattr(scheduler, "state_in_first_order"):  # Heun, KDPM2
        return call % 2 == 0
    if hasattr(scheduler, "order_list"):  # DPM++ 2S and 3S; the first calls have no history
        return bool(min(scheduler.order_list[start + call], call + 1) == 1)
    if hasattr(scheduler, "counter"):  # PNDM: a Runge-Kutta start, or one step done twice
        if not scheduler.config.skip_prk_steps and call < len(scheduler.prk_timesteps):
            return call % 4 == 0
        return call != 1
    return True
