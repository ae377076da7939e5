"""Base of guidance that makes something else of what classifier-free guidance combines.

Classifier-free guidance is Ho & Salimans 2022 (arXiv:2207.12598): null + w (cond - null).
"""

from dataclasses import dataclass

from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.noise import wide
from guidekit.run import Run
from guidekit.step import Step


@dataclass(kw_only=True)
class Contrast(Guidance):
    """Guidance that replaces null + w (cond - null); a subclass has `contrasted`.

    What other plugins add to the combination stays. Steps without a null branch (outside of cfg's
    interval) are as they are. Raises GuidekitError for a scale other than 0 and 1, and for a run
    without classifier-free guidance.
    """

    scale: float = 1.0  # 1 on, 0 off

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in (0, 1):
            raise GuidekitError(
                f"{self.name}.scale is 1 (on) or 0 (off), not {self.scale}; set the run's cfg"
            )

    def prepare(self, run: Run) -> None:
        """Raises GuidekitError for a run without classifier-free guidance."""
        if run.cfg <= 1:
            raise GuidekitError(
                f"{self.name} changes classifier-free guidance, and cfg is {run.cfg:g}"
            )

    def contrasted(self, step: Step, cond: Tensor, null: Tensor, weight: float) -> Tensor:
        """What takes the place of null + weight * (cond - null), outputs (B, C, h, w)."""
        raise NotImplementedError

    def weight(self, step: Step) -> float | None:
        """The scale of classifier-free guidance at a step; None where there is none."""
        found = next((b.weight for b in step.branches if b.name == "cond"), None)
        return found if any(b.name == "null" for b in step.branches) else None

    def combine(self, step: Step, outs: dict[str, Tensor], combined: Tensor) -> Tensor:
        """The combination with its contrast replaced."""
        weight = self.weight(step)
        if weight is None:
            return combined
        cond, null = wide(outs["cond"], outs["null"])
        plain = null + weight * (cond - null)
        change = self.contrasted(step, cond, null, weight) - plain
        return (combined + change).to(combined.dtype)
