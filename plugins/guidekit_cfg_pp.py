"""CFG++: x0 between the null and the conditional estimate, noised again by the null's noise.

Chung, Kim, Park, Nam, Ye: CFG++: Manifold-constrained Classifier Free Guidance for Diffusion
Models, ICLR 2025, arXiv:2406.08070. Algorithm 2: x0 is that of eps_null + lambda (eps_cond -
eps_null) with lambda from 0 to 1, and the step goes on from it with eps_null. Steps that add noise
keep theirs.
"""

from dataclasses import dataclass

from torch import Tensor

from guidekit import GuidekitError, Step, hookimpl
from guidekit.toolbox import Contrast


@dataclass(kw_only=True)
class CfgPlusPlus(Contrast):
    """Interpolates in place of classifier-free guidance's extrapolation; needs cfg above 1."""

    plugin = "cfg-pp"

    strength: float = 0.6  # lambda, from the null's image at 0 to the conditional one's at 1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise GuidekitError(f"{self.name}.strength lies from 0 to 1, not {self.strength}")

    def contrasted(self, step: Step, cond: Tensor, null: Tensor, weight: float) -> Tensor:
        """null + lambda (cond - null)."""
        return null + self.strength * (cond - null)

    def edit_prediction(self, step: Step, out: Tensor) -> Tensor:
        """The output after which the next z has the null's noise in place of the combination's."""
        if self.weight(step) is None or not step.ends_step:
            return out
        contrast = step.cond.out.detach() - step.evals["null"].out.detach()
        # eps is affine in the output.
        noise = -self.strength * step.level.eps_weights()[1] * contrast
        kept = max(step.next_level.s**2 - step.move.noise_std**2, 0.0) ** 0.5
        return step.shifted(out, kept * noise, self.name)


@hookimpl
def register_guidance(register):
    """Offers `cfg-pp`."""
    register("cfg-pp", CfgPlusPlus)
