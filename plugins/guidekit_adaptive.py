"""Adaptive guidance: no null branch any more once it says what the conditional one says.

Castillo, Kohler, Perez, Perez, Pumarola, Ghanem, Arbelaez, Thabet: Adaptive Guidance: Training-free
Acceleration of Conditional Diffusion Models, 2023, arXiv:2312.12487, section 5: classifier-free
guidance ends where the cosine of the two predictions exceeds a threshold. Here each image ends by
itself, and the denoiser gets as many rows fewer. The predictions are the model's own outputs, noise
or velocity.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit import Branch, Guidance, GuidekitError, Run, Step, hookimpl


@dataclass(kw_only=True)
class Adaptive(Guidance):
    """Drops the null branch of an image from the step on after which both agreed."""

    plugin = "adaptive"

    scale: float = 1.0  # 1 on, 0 off
    threshold: float = 0.991  # cosine of the two outputs above which an image needs no null

    def __post_init__(self):
        super().__post_init__()
        if self.scale not in (0, 1) or not -1 <= self.threshold <= 1:
            raise GuidekitError(
                f"{self.name}.scale is 1 (on) or 0 (off), and threshold lies between -1 and 1"
            )

    def prepare(self, run: Run) -> None:
        """Raises GuidekitError for a run without classifier-free guidance."""
        if run.cfg <= 1:
            raise GuidekitError(
                f"{self.name} ends classifier-free guidance, and cfg is {run.cfg:g}"
            )
        self._agreed = torch.zeros(len(run.seeds), dtype=torch.bool, device=run.device)

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """The null branch of the images that still need it."""
        if self._agreed.any():
            for branch in branches:
                if branch.name == "null":
                    branch.images = ~self._agreed
        return branches

    def combine(self, step: Step, outs: dict[str, Tensor], combined: Tensor) -> Tensor:
        """The combination as it is; notes which images agree."""
        if "null" in outs and "cond" in outs:
            cond, null = (outs[name].detach().float().flatten(1) for name in ("cond", "null"))
            self._agreed = self._agreed | (F.cosine_similarity(cond, null) > self.threshold)
        return combined

    @classmethod
    def example(cls) -> "Adaptive":
        """Ends after the first step."""
        return cls(threshold=-1.0)


@hookimpl
def register_guidance(register):
    """Offers `adaptive`."""
    register("adaptive", Adaptive)
