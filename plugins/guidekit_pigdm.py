"""PiGDM: a measurement is met by its likelihood under a Gaussian round the clean estimate.

Song, Vahdat, Mardani, Kautz: Pseudoinverse-Guided Diffusion Models for Inverse Problems, ICLR 2023.
Section 3: p(x0 | z) is taken as N(x0 estimate, r^2) with r^2 = sigma^2 / (1 + sigma^2), so
the score of y is J^T A^T (r^2 A A^T + noise^2)^-1 (y - A x0), J being the denoiser's Jacobian. That
is exact where the images' own law is a Gaussian of variance 1, whatever its mean. Algorithm 1
weighs it by r^2, as is the default here.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from guidekit import GuidekitError, Step, hookimpl
from guidekit.toolbox import InverseGuidance


@dataclass(kw_only=True)
class Pigdm(InverseGuidance):
    """Adds the score of a measurement with Gaussian noise, or with none."""

    plugin = "pigdm"

    scale: float = 1.0  # factor on the score
    noise: float = 0.0  # standard deviation of the measurement's noise, images being in [-1, 1]
    # paper: z' moves by a a' r^2 times the score; score: by what the score is worth to the solver,
    # which leads to the posterior as steps become many, and is rough with few
    weight: Literal["paper", "score"] = "paper"

    waived: ClassVar[dict[str, str]] = {
        "energy": "the vector before the Jacobian is held constant, by the paper"
    }

    def __post_init__(self):
        super().__post_init__()
        if self.noise < 0:
            raise GuidekitError(f"{self.name}.noise is at least 0, not {self.noise}")

    def energy(self, step: Step) -> Tensor:
        """Minus the product of x0 and the constant vector (B,), whose gradient is the score."""
        pixels, var = step.decode(step.x0), _variance(step)
        ridge = self.noise**2 / var
        vector = self._linear.adjoint(self._linear.solve(self.residual(pixels), ridge))
        return -(vector.detach() * pixels).flatten(1).sum(1) / var

    def push(self, step: Step, grad: Tensor) -> Tensor:
        """By the score, or by the paper's move of z."""
        if self.weight == "score":
            return step.move.score(-self.scale * grad)
        amount = self.scale * step.level.a * step.next_level.a * _variance(step)
        return step.move.shift(-amount * grad) if step.ends_step else 0 * grad


def _variance(step: Step) -> float:
    """r^2 in a form that holds at a = 0 too."""
    return step.level.s**2 / (step.level.a**2 + step.level.s**2)


@hookimpl
def register_guidance(register):
    """Offers `pigdm`."""
    register("pigdm", Pigdm)
