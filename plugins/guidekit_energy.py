"""Energy: any differentiable function or network of images guides, by its gradient.

Dhariwal, Nichol: Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv:2105.05233, Algorithm
2, with the loss at the clean estimate in place of a classifier of noisy images, as in Bansal et al.
2023 (arXiv:2302.07121, section 3.1): eps + scale * s * gradient.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from guidekit import Step, hookimpl
from guidekit.toolbox import LossGuidance


@dataclass(kw_only=True)
class Energy(LossGuidance):
    """Lowers a loss of images, `energy.loss=MODULE:NAME`, or the distance to a measurement."""

    plugin = "energy"

    scale: float = 1.0  # factor on the energy; its gradient is that of log p(wanted | image)

    usage: ClassVar[str] = "--model scenes-ddpm --set energy.measurement=scene-3"

    def energy(self, step: Step) -> Tensor:
        """The loss (B,)."""
        return self.distance(step, step.x0)


@hookimpl
def register_guidance(register):
    """Offers `energy`."""
    register("energy", Energy)
