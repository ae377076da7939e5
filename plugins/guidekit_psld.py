"""PSLD: DPS for latent models, with a term that keeps latents where autoencoding leaves them.

Rout, Raoof, Daras, Caramanis, Dimakis, Shakkottai: Solving Linear Inverse Problems Provably via
Posterior Sampling with Latent Diffusion Models, NeurIPS 2023, arXiv:2307.00619. Algorithm 1: beside
DPS's norm that of E(A^+ y + D(x0) - A^+ A D(x0)) - x0, of what the encoder makes of the image once
the measurement is put in. The paper has A^T, which is A^+ where rows of A are orthonormal.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from guidekit import Step, hookimpl
from guidekit.toolbox import InverseGuidance


@dataclass(kw_only=True)
class Psld(InverseGuidance):
    """Moves z against both norms."""

    plugin = "psld"

    scale: float = 1.0  # eta, factor on both norms; of one step
    gluing: float = 1.0  # gamma, weight of the second norm

    acts_at: ClassVar[Literal["calls", "steps"]] = "steps"

    def energy(self, step: Step) -> Tensor:
        """The weighted norms (B,)."""
        pixels = step.decode(step.x0)
        residual = self.residual(pixels)
        glued = step.encode(pixels + self._linear.pinv(residual)) - step.x0
        norms = [part.flatten(1).norm(dim=1) for part in (residual, glued)]
        return norms[0] + self.gluing * norms[1]

    def push(self, step: Step, grad: Tensor) -> Tensor:
        """z' - scale * gradient."""
        return step.move.shift(-self.scale * self.unit(step) * grad)


@hookimpl
def register_guidance(register):
    """Offers `psld`."""
    register("psld", Psld)
