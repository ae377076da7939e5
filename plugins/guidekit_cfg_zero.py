"""CFG-Zero*: classifier-free guidance of flow models from a rescaled null, after a first pause.

Fan, Zheng, Yeh, Liu: CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models, 2025,
arXiv:2503.18886. Section 3: the null prediction is projected onto the conditional one's scale,
s = <cond, null> / <null, null>, and the velocity of the first steps is zero, as that of a model is
worse than none there. The latter is for flow models alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import GuidekitError, Step, hookimpl
from guidekit.toolbox import Contrast


@dataclass(kw_only=True)
class CfgZero(Contrast):
    """Rescales the null branch, and lets flow models stand still at first."""

    plugin = "cfg-zero"

    zero: float = 0.04  # fraction of the steps, rounded, at which the velocity is zero

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.zero <= 1:
            raise GuidekitError(f"{self.name}.zero is a fraction of the steps, not {self.zero}")

    def contrasted(self, step: Step, cond: Tensor, null: Tensor, weight: float) -> Tensor:
        """s null + w (cond - s null), or nothing."""
        if step.level.kind == "flow" and step.index < round(self.zero * step.n):
            return torch.zeros_like(cond)
        along = (cond * null).flatten(1).sum(1) / null.square().flatten(1).sum(1).clamp(min=1e-12)
        null = along[:, None, None, None] * null
        return null + weight * (cond - null)


@hookimpl
def register_guidance(register):
    """Offers `cfg-zero`."""
    register("cfg-zero", CfgZero)
