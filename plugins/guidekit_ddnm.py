"""DDNM: the clean estimate gets the measured part, and keeps the rest, at every step.

Wang, Yu, Zhang: Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model, ICLR 2023,
arXiv:2212.00490. Algorithm 1: x0 + A^+ (y - A x0), and the step goes on from it with the noise that
was predicted, as in the released code. Without noise in the measurement the finished image meets it
exactly. `travel` and `times` are its time travel (section 3.3).
"""

from dataclasses import dataclass

from torch import Tensor

from guidekit import GuidekitError, Step, hookimpl
from guidekit.toolbox import InverseGuidance


@dataclass(kw_only=True)
class Ddnm(InverseGuidance):
    """Replaces what was measured in the clean estimate."""

    plugin = "ddnm"

    scale: float = 1.0  # share of the measured part that is replaced
    travel: int = 1  # steps that are done again together
    times: int = 1  # how often they are done

    def __post_init__(self):
        super().__post_init__()
        if self.travel < 1 or self.times < 1:
            raise GuidekitError(f"{self.name}.travel and times are at least 1")

    def edit_prediction(self, step: Step, out: Tensor) -> Tensor:
        """The output whose x0 is corrected and whose noise is not."""
        if not (step.informative and step.ends_step):
            return out
        x0 = step.level.x0(out, step.z)
        pixels = step.decode(x0)
        better = pixels + self.scale * self._linear.pinv(self.residual(pixels))
        # An autoencoder's own error is in both, and changes nothing.
        change = step.encode(better) - step.encode(pixels)
        return step.shifted(out, step.next_level.a * change, self.name)

    def jumps(self, step: Step) -> int:
        """Back over `travel` steps at the end of each such stretch."""
        number = sum(calls[-1] < step.index for calls in step.run.levels.steps)
        ends = number % self.travel == self.travel - 1
        return self.travel if ends and step.repeat + 1 < self.times else 0


@hookimpl
def register_guidance(register):
    """Offers `ddnm`."""
    register("ddnm", Ddnm)
