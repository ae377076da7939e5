"""Universal guidance: a loss by its gradient through the denoiser, and by descent on x0 itself.

Bansal, Chu, Schwarzschild, Sengupta, Goldblum, Geiping, Goldstein: Universal Guidance for Diffusion
Models, 2023, arXiv:2302.07121. Forward (section 3.1): eps + scale * s * gradient. Backward (section
3.2): x0 moves by what several steps of Adam find, and the noise is read off anew. Recurrence
(section 3.3): a step is done `times` times.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from guidekit import GuidekitError, Step, hookimpl
from guidekit.toolbox import LossGuidance


@dataclass(kw_only=True)
class Universal(LossGuidance):
    """Lowers a loss, or the distance to a measurement, forward and backward."""

    plugin = "ugd"

    scale: float = 1.0  # factor on the gradient through the denoiser
    backward: int = 0  # m, steps of Adam on x0
    rate: float = 0.01  # the first step of Adam; they end at 0 as a cosine does
    times: int = 1  # k, how often a step is done

    def __post_init__(self):
        super().__post_init__()
        if self.backward < 0 or self.times < 1 or not self.rate > 0:
            raise GuidekitError(
                f"{self.name}: backward is at least 0, times at least 1, rate above 0"
            )

    def energy(self, step: Step) -> Tensor:
        """The loss (B,)."""
        return self.distance(step, step.x0)

    def edit_prediction(self, step: Step, out: Tensor) -> Tensor:
        """The output of an x0 that moved by descent from the unguided one, eps read off anew."""
        if not (self.backward and step.informative):
            return out
        change = self._descent(step, step.level.x0(step.out.detach(), step.z))
        # The output is affine in x0; at z = 0 its change is left.
        moved = step.level.out_from_x0(change, torch.zeros_like(change))
        return (out + moved).to(out.dtype)

    def _descent(self, step: Step, x0: Tensor) -> Tensor:
        """How far Adam moves x0 (B, C, h, w)."""
        moving = x0.detach().clone()
        adam = torch.optim.Adam([moving], self.rate)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.backward)
        for _ in range(self.backward):
            moving.grad = self.gradient(moving, partial(self.distance, step))
            adam.step()
            cosine.step()
        return moving - x0

    def repeats(self, step: Step) -> int:
        """As often as `times` says."""
        return self.times

    @classmethod
    def example(cls) -> "Universal":
        """Both ways."""
        return cls(measurement=super().example().measurement, backward=2)


@hookimpl
def register_guidance(register):
    """Offers `ugd`."""
    register("ugd", Universal)
