"""MPGD: the clean estimate itself moves against the gradient of a loss, not through the denoiser.

He, Murata, Lai, Takida, Uesaka, Kim, Liao, Mitsufuji, Kolter, Salakhutdinov, Ermon: Manifold
Preserving Guided Diffusion, ICLR 2024, arXiv:2311.16424. Algorithm 1 with step rho / a: x0 moves,
the predicted noise stays.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from guidekit import Step, hookimpl
from guidekit.toolbox import LossGuidance


@dataclass(kw_only=True)
class Mpgd(LossGuidance):
    """Moves x0 against the gradient of the distance to a measurement, or of a loss."""

    plugin = "mpgd"

    scale: float = 5.0  # rho: x0 moves by rho / a times the gradient

    def edit_prediction(self, step: Step, out: Tensor) -> Tensor:
        """The output whose x0 has moved and whose noise has not."""
        if not (step.informative and step.ends_step):
            return out
        grad = self.gradient(step.level.x0(out, step.z), partial(self.distance, step))
        # Of VP, where a^2 + s^2 = 1, as the paper's is.
        rate = self.scale * step.level.norm / step.level.a
        return step.shifted(out, -rate * step.next_level.a * grad, self.name)


@hookimpl
def register_guidance(register):
    """Offers `mpgd`."""
    register("mpgd", Mpgd)
