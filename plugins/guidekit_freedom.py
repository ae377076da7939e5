"""FreeDoM: any loss of the clean estimate, in steps as long as the contrast of both branches.

Yu, Wang, Zhao, Ghanem, Zhang: FreeDoM: Training-Free Energy-Guided Conditional Diffusion Model,
ICCV 2023, arXiv:2303.09833. Algorithm 2: z' moves by -rho times the gradient, and steps in the
middle of the run are done several times. As in the released code rho is in proportion to the
contrast of classifier-free guidance over the gradient, here of each image; without it rho is
scale * a.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from guidekit import GuidekitError, Step, hookimpl
from guidekit.toolbox import LossGuidance


@dataclass(kw_only=True)
class FreeDom(LossGuidance):
    """Moves z against the gradient of a loss, or of the distance to a measurement."""

    plugin = "freedom"

    scale: float = 0.2  # share of the contrast of classifier-free guidance, or factor on a
    times: int = 3  # how often a step of `again` is done
    again: tuple[float, ...] = (0.4, 0.7)  # fractions of the run between which steps are repeated

    acts_at: ClassVar[Literal["calls", "steps"]] = "steps"

    def __post_init__(self):
        super().__post_init__()
        if self.times < 1 or len(self.again) != 2:
            raise GuidekitError(f"{self.name}.times is at least 1, and again two fractions")

    def energy(self, step: Step) -> Tensor:
        """The loss (B,)."""
        return self.distance(step, step.x0)

    def push(self, step: Step, grad: Tensor) -> Tensor:
        """z' - rho * gradient, rho of each image by itself."""
        rho = self.scale * self._length(step, grad) * step.next_level.norm
        return step.move.shift(-rho * grad)

    def _length(self, step: Step, grad: Tensor) -> Tensor | float:
        """The contrast over the gradient (B, 1, 1, 1), or a."""
        weight = next((b.weight for b in step.branches if b.name == "cond"), None)
        if weight is None or "null" not in step.evals:
            return step.level.a
        _, eps_per_out = step.level.eps_weights()
        contrast = eps_per_out * (step.cond.out - step.evals["null"].out).detach()
        sizes = [x.float().flatten(1).norm(dim=1) for x in (contrast, grad)]
        return (weight * sizes[0] / sizes[1].clamp(min=1e-12))[:, None, None, None]

    def repeats(self, step: Step) -> int:
        """Several times in the middle of the run."""
        return self.times if self.again[0] <= step.frac < self.again[1] else 1


@hookimpl
def register_guidance(register):
    """Offers `freedom`."""
    register("freedom", FreeDom)
