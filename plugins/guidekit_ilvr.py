"""ILVR: low frequencies of the image are those of a reference, at every step.

Choi, Kim, Jeong, Gwon, Yoon: ILVR: Conditioning Method for Denoising Diffusion Probabilistic
Models, ICCV 2021, arXiv:2108.02938. The reference is noised to the level of the next sample,
y_{t-1}, as in the paper; the released code takes that of the present one.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit import Guidance, GuidekitError, Run, Step, hookimpl
from guidekit.toolbox import lost_edit, read_references


@dataclass(kw_only=True)
class Ilvr(Guidance):
    """Replaces what is left of z after down- and upsampling by that of the noised reference.

    Raises GuidekitError for schedulers that would lose the edit.
    """

    scale: float = 1.0  # share of the low frequencies that is replaced
    image: Path = Path("")  # reference image; scene-3 is a built-in one
    down: int = 4  # N: low frequencies are those that an N times smaller image has
    own_images: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        if self.down < 2:
            raise GuidekitError(f"{self.name}.down is at least 2, not {self.down}")

    def towards(self, images: Tensor) -> "Ilvr":
        """Itself, with references (B, 3, H, W) in [-1, 1] of the images of one batch.

        In place of `image`. `Condition(targets={"ilvr": reference})` gives each image its own.
        """
        self.own_images = images
        return self

    def prepare(self, run: Run) -> None:
        """Reads the reference; raises GuidekitError for a scheduler that does not read z."""
        levels = run.levels
        if not all(levels.move(i).reads_sample for i in range(len(levels))):
            raise lost_edit(run.scheduler, f"{self.name} edits z")
        if min(run.grid) < self.down:
            raise GuidekitError(f"{self.name}.down={self.down} is more than the {run.grid} of z")
        own = run.targets(self.name)
        images = self.own_images if own is None else torch.stack(own)
        if images is None:
            if self.image == Path(""):
                raise GuidekitError(f"{self.name} needs a reference: --set {self.name}.image=FILE")
            images = read_references([self.image], run.size).expand(len(run.seeds), -1, -1, -1)
        if len(images) != len(run.seeds):
            raise GuidekitError(f"{len(images)} references for {len(run.seeds)} images")
        with torch.no_grad():
            self._reference = run.denoiser.latents(images.to(run.device))

    def edit_sample(self, step: Step, z: Tensor) -> Tensor:
        """z + scale * (low(y) - low(z)), y being the reference at z's level."""
        y = step.next_level.a * self._reference
        y = y + step.next_level.s * step.noise(self.name).to(y)
        wide = z.to(y.dtype)
        return (wide + self.scale * low_pass(y - wide, self.down)).to(z.dtype)

    @classmethod
    def example(cls) -> "Ilvr":
        """A built-in reference."""
        return cls(image=Path("scene-3"))


def low_pass(x: Tensor, down: int) -> Tensor:
    """x (B, C, h, w) made `down` times smaller and as large again, by antialiased bicubics."""
    small = [max(side // down, 1) for side in x.shape[-2:]]
    small = F.interpolate(x, small, mode="bicubic", antialias=True)
    return F.interpolate(small, x.shape[-2:], mode="bicubic")


@hookimpl
def register_guidance(register):
    """Offers `ilvr`."""
    register("ilvr", Ilvr)
