"""Rectified-CFG++: the contrast of both predictions is taken where the conditional one leads.

Saini, Gupta, Bovik: Rectified-CFG++ for Flow Based Models, NeurIPS 2025, arXiv:2510.07631. A step
with the conditional velocity predicts the next z; the contrast there corrects that velocity:
cond + lambda (cond' - null'). As in the released code the prediction is a whole step, and no noise
is added to it here; the last step takes the contrast where it is. Other models than flow ones do
the same with their own outputs, by the first-order step between their levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import GuidekitError, Step, hookimpl
from guidekit.toolbox import Contrast


@dataclass(kw_only=True)
class RectifiedCfg(Contrast):
    """Corrects the conditional prediction by the contrast at the next level; four calls a step."""

    plugin = "rectified-cfg-pp"

    strength: float = 0.0  # lambda; 0 is cfg - 1, with which both contrasts weigh the same

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.strength < float("inf"):
            raise GuidekitError(f"{self.name}.strength is at least 0, not {self.strength}")

    def contrasted(self, step: Step, cond: Tensor, null: Tensor, weight: float) -> Tensor:
        """cond + lambda (cond' - null')."""
        there = self._ahead(step, cond)
        cond_there, null_there = (cond, null) if there is None else there
        return cond + (self.strength or weight - 1) * (cond_there - null_there)

    def _ahead(self, step: Step, cond: Tensor) -> list[Tensor] | None:
        """Both outputs at the level of the next call; None where there is none."""
        index, run = step.index + 1, step.run
        if index == step.n:
            return None
        level = run.levels.at(index)
        z = level.a * step.level.x0(cond, step.z) + level.s * step.level.eps(cond, step.z)
        timestep = run.scheduler.timesteps[run.levels.start + index]
        graph = torch.is_grad_enabled()
        return [
            step.denoise(z / level.norm, timestep, self, branch, graph).out.to(cond)
            for branch in ("cond", "null")
        ]


@hookimpl
def register_guidance(register):
    """Offers `rectified-cfg-pp`."""
    register("rectified-cfg-pp", RectifiedCfg)
