"""Adaptive projected guidance: classifier-free guidance without oversaturation at high scales.

Sadat, Hilliges, Weber: Eliminating oversaturation and artifacts of high guidance scales in
diffusion models, ICLR 2025, arXiv:2410.02416. The difference of the conditional and the null
prediction gets a (negative) momentum over the steps, a bound on its norm, and loses a part of its
component along the conditional prediction. As in the paper these are predictions of x0; diffusers'
guider does the same to the model's output, whatever it means.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import Guidance, GuidekitError, Run, Step, hookimpl


@dataclass(kw_only=True)
class AdaptiveProjected(Guidance):
    """Changes what classifier-free guidance adds to the conditional prediction.

    With momentum 0, parallel 1 and no bound it changes nothing. The strength is the run's guidance
    scale. Its change is added to what plugins named before it made of the output; those that
    multiply the output (cfg.rescale) are best named after it.
    """

    plugin = "apg"

    scale: float = 1.0  # 1 on, 0 off
    momentum: float = -0.5  # beta, of the differences of earlier steps
    bound: float = 15.0  # r, largest L2 norm of the difference in x0; 0 is none
    parallel: float = 0.0  # eta, share kept of the component along the conditional x0

    def __post_init__(self):
        super().__post_init__()
        if self.scale not in (0, 1):
            raise GuidekitError(
                f"apg.scale is 1 (on) or 0 (off), not {self.scale}; set the run's cfg"
            )
        if not -1 < self.momentum < 1:
            raise GuidekitError(f"apg.momentum lies between -1 and 1, not {self.momentum}")
        if not 0 <= self.bound < math.inf or not math.isfinite(self.parallel):
            raise GuidekitError("apg.bound and apg.parallel must be finite, and bound at least 0")

    def prepare(self, run: Run) -> None:
        """Raises GuidekitError for a run without classifier-free guidance."""
        if run.cfg <= 1:
            raise GuidekitError(f"apg changes classifier-free guidance, and cfg is {run.cfg:g}")
        self._history: dict[int, Tensor] = {}

    def combine(self, step: Step, outs: dict[str, Tensor], combined: Tensor) -> Tensor:
        """The combination with its difference of conditional and null adapted."""
        weight = next((b.weight for b in step.branches if b.name == "cond"), None)
        if weight is None or "null" not in outs:  # cfg has ended its interval
            return combined
        cond, null = step.branch_x0("cond"), step.branch_x0("null")
        # cond + (w - 1) d in place of cond + (w - 1) (cond - null), d being the adapted difference.
        change = (weight - 1) * (self._adapted(step, cond, cond - null) - (cond - null))
        # The output is affine in x0; at z = 0 its change is left.
        return combined + step.level.out_from_x0(change, torch.zeros_like(change)).to(combined)

    def _adapted(self, step: Step, cond: Tensor, difference: Tensor) -> Tensor:
        """Momentum, bound and projection of the difference in x0 (B, C, h, w)."""
        # A step that is done again starts from the average before it, without its own graph.
        before = self._history.get(step.index - 1, 0)
        difference = difference + self.momentum * before
        self._history = {k: v for k, v in self._history.items() if k == step.index - 1}
        self._history[step.index] = difference.detach()
        norm = difference.flatten(1).norm(dim=1)[:, None, None, None]
        if self.bound:
            difference = difference * (self.bound / norm).clamp(max=1)
        unit = cond / cond.flatten(1).norm(dim=1)[:, None, None, None]
        along = (difference * unit).sum((1, 2, 3), keepdim=True) * unit
        return difference + (self.parallel - 1) * along


@hookimpl
def register_guidance(register):
    """Offers `apg`."""
    register("apg", AdaptiveProjected)
