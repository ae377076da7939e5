"""DPS: a measurement is met by the gradient of the residual's norm, through the denoiser.

Chung, Kim, McCann, Klasky, Ye: Diffusion Posterior Sampling for General Noisy Inverse Problems,
ICLR 2023, arXiv:2209.14687. Algorithm 1, line 7: the next z moves by -zeta times the gradient of
|y - A x0|, whose step over the norm is that of the squared norm. Norms are of each image alone.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from guidekit import Step, hookimpl
from guidekit.toolbox import LossGuidance


@dataclass(kw_only=True)
class Dps(LossGuidance):
    """Moves z against the gradient of the distance to a measurement, or of a loss."""

    plugin = "dps"

    scale: float = 1.0  # zeta, of one step; the paper's 0.3 to 1 are for 1000 steps

    acts_at: ClassVar[Literal["calls", "steps"]] = "steps"

    def energy(self, step: Step) -> Tensor:
        """The norm of the residual (B,)."""
        return self.distance(step, step.x0)

    def push(self, step: Step, grad: Tensor) -> Tensor:
        """z' - zeta * gradient."""
        return step.move.shift(-self.scale * self.unit(step) * grad)


@hookimpl
def register_guidance(register):
    """Offers `dps`."""
    register("dps", Dps)
