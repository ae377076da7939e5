"""FlowChef: z moves against the gradient of a loss at the clean estimate, not through the model.

Patel, Wen, Metaxas, Yang: Steering Rectified Flow Models in the Vector Field for Controlled Image
Generation, 2024, arXiv:2412.00100. Algorithm 1: the gradient at x0 is applied to the next z as it
is. On rectified flows the way from z to x0 is nearly straight, which makes that enough; `stop` ends
it before the last steps, where nothing takes a large move back.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from guidekit import Step, hookimpl
from guidekit.toolbox import LossGuidance


@dataclass(kw_only=True)
class FlowChef(LossGuidance):
    """Moves z against the gradient at x0 of the distance to a measurement, or of a loss."""

    plugin = "flowchef"

    scale: float = 5.0  # size of a move
    stop: float = 0.9  # fraction of the steps at which it ends

    def edit_prediction(self, step: Step, out: Tensor) -> Tensor:
        """z' - scale * gradient."""
        if not (step.informative and step.ends_step):
            return out
        grad = self.gradient(step.level.x0(out, step.z), partial(self.distance, step))
        return step.shifted(out, -self.scale * step.next_level.norm * grad, self.name)


@hookimpl
def register_guidance(register):
    """Offers `flowchef`."""
    register("flowchef", FlowChef)
