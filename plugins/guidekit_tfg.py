"""TFG: the space that DPS, MPGD, LGD, FreeDoM and universal guidance are points of.

Ye, Lin, Han, Xu, Liu, Liang, Ma, Zou, Ermon: TFG: Unified Training-Free Guidance for Diffusion
Models, NeurIPS 2024, arXiv:2409.15761. Algorithm 1, with f(x) the logarithm of the mean of
exp(-loss(x + sigma s n)): z' = step(x0, eps) + rho a' / a grad_z f(x0) + a' d, d being what `inner`
ascents by mu on f find from x0. rho and mu are means over the steps, whatever their number
(section 4.1). mu = 0 is DPS or LGD, rho = 0 MPGD, `times` FreeDoM's recurrence.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from guidekit import GuidekitError, Run, Step, hookimpl
from guidekit.toolbox import LossGuidance

Shape = Literal["increase", "decrease", "constant"]


@dataclass(kw_only=True)
class TrainingFree(LossGuidance):
    """Moves z by the gradient through the denoiser, and x0 by that of the loss alone."""

    plugin = "tfg"

    scale: float = 1.0  # factor on rho and mu
    rho: float = 1.0  # mean over the steps of the factor on the gradient through the denoiser
    mu: float = 0.25  # mean over the steps of the factor on the gradient at x0
    sigma: float = 0.001  # width of the mean, times s
    inner: int = 4  # moves of x0 in a step
    samples: int = 1  # of the mean
    times: int = 1  # how often a step is done
    rho_shape: Shape = "increase"  # of rho over the run
    mu_shape: Shape = "increase"  # of mu over the run

    acts_at: ClassVar[Literal["calls", "steps"]] = "steps"

    def __post_init__(self):
        super().__post_init__()
        if self.inner < 0 or self.samples < 1 or self.times < 1 or self.sigma < 0:
            raise GuidekitError(
                f"{self.name}: inner and sigma are at least 0, samples and times at least 1"
            )

    def prepare(self, run: Run) -> None:
        """Reads what to reach, and tabulates rho and mu."""
        super().prepare(run)
        self._rho, self._mu = (course(run, shape) for shape in (self.rho_shape, self.mu_shape))

    def energy(self, step: Step) -> Tensor:
        """-f (B,) of the clean estimate."""
        return self._smooth(step, step.x0)

    def _smooth(self, step: Step, x0: Tensor) -> Tensor:
        """-f (B,), the logarithm of the mean over noise of exp(-loss)."""
        width, found = self.sigma * step.level.s / step.level.norm, []
        for sample in range(self.samples):
            noise = step.noise(f"{self.name}-{sample}").to(x0)
            found.append(-self.squared(step, x0 + width * noise))
        return math.log(self.samples) - torch.stack(found).logsumexp(0)

    def push(self, step: Step, grad: Tensor) -> Tensor:
        """z' + rho a' / a grad f; nothing where z holds nothing of the image."""
        if not step.informative:
            return torch.zeros_like(grad)
        rho = self.scale * self.rho * self._rho[step.index]
        # In units of the model's input, as the paper's z is.
        amount = rho * step.level.norm**2 * step.next_level.a / step.level.a
        return step.move.shift(-amount * grad)

    def edit_prediction(self, step: Step, out: Tensor) -> Tensor:
        """z' + a' d, from the estimate that nothing moved yet."""
        if not (self.inner and self.mu and step.informative):
            return out
        start = step.level.x0(step.out.detach(), step.z)
        x0, amount = start, self.scale * self.mu * self._mu[step.index]
        for _ in range(self.inner):
            x0 = x0 - amount * self.gradient(x0, partial(self._smooth, step))
        return step.shifted(out, step.next_level.a * (x0 - start), self.name)

    def repeats(self, step: Step) -> int:
        """As often as `times` says."""
        return self.times


def course(run: Run, shape: Shape) -> list[float]:
    """Weights of the calls of a run by (a / a')^2, whose mean is one."""
    calls = range(len(run.levels))
    pairs = [(run.levels.at(k), run.levels.next(k)) for k in calls]
    ratios = [(before.a * after.norm / (before.norm * after.a)) ** 2 for before, after in pairs]
    weights = {
        "increase": ratios,
        "decrease": [1 - ratio for ratio in ratios],
        "constant": [1.0 for _ in ratios],
    }[shape]
    mean = sum(weights) / len(weights)
    return [weight / mean for weight in weights]


@hookimpl
def register_guidance(register):
    """Offers `tfg`."""
    register("tfg", TrainingFree)
