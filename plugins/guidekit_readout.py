"""Readout guidance: towards a given depth, edge map or other dense target, by a readout head.

Luo, Darrell, Wang, Goldman, Holynski: Readout Guidance: Learning Control from Diffusion Features,
CVPR 2024, arXiv:2312.02150, section 3.2 (spatially aligned control): the head reads the target out
of the denoiser's own features of the noisy image, and the gradient of the squared difference to the
wanted one is added to the score. The head is fitted by `guidekit fit --kind readout`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from guidekit import Condition, FeatureRead, Guidance, GuidekitError, Run, Step, hookimpl
from guidekit.heads.pairs import at_grid, cut, read_target
from guidekit.heads.readout import ReadoutHead, load_readout, new_readout

RANDOM = "random"  # the name of a head that nobody fitted


@dataclass(kw_only=True)
class Readout(Guidance):
    """Pulls what a readout head sees in the image towards a target.

    An image's own target is `Condition(targets={"readout": ...})`: a tensor (D, h, w), NaN where
    anything goes, or the path of a file.
    """

    plugin = "readout"

    scale: float = 100.0  # strength
    stop: float = 0.8  # fraction of the steps at which it ends
    head: Path | None = None  # folder that guidekit fit wrote; there is none to begin with
    target: Path | None = None  # image or .npy of the wanted map, as the head learned; or none
    level: float | None = None  # a number for the whole map in place of a file, or none

    graph = "features"
    usage: ClassVar[str] = (
        "--model digits-ddpm --set readout.head=heads/map --set readout.level=0.5"
        "  # after guidekit fit pairs/ --kind readout --model digits-ddpm --out heads/map"
    )

    def prepare(self, run: Run) -> None:
        """Loads the head, checks it against the backbone, and asks for its features."""
        self._head = self._load(run)
        self._head.to(run.device, torch.promote_types(run.denoiser.dtype, torch.float32))
        self._read = run.read(self, FeatureRead(self._head.config.sites))
        own = run.targets(self.name)
        wanted = [self._own(run)] * len(run.seeds) if own is None else own
        grid = run.grid
        maps = torch.stack([at_grid(self._map(target, run.size), grid) for target in wanted])
        if maps.shape[1] != self._head.config.targets:
            raise GuidekitError(
                f"the target of {self.name} has {maps.shape[1]} channels, and the head "
                f"{self._head.config.targets}"
            )
        if maps.isnan().all():
            raise GuidekitError(f"the target of {self.name} is NaN everywhere; nothing is asked")
        self._target = self._head.standard(maps.to(self._head.mean))

    def _load(self, run: Run) -> ReadoutHead:
        if self.head is None:
            raise GuidekitError(
                f"{self.name} needs a head: --set {self.name}.head=FOLDER, from guidekit fit "
                "--kind readout"
            )
        if self.head.name == RANDOM and not self.head.exists():
            return new_readout(run.denoiser, 1).eval().requires_grad_(False)
        return load_readout(self.head, run.denoiser)

    def _own(self, run: Run) -> Path | Tensor:
        """The target of the options."""
        if (self.target is None) == (self.level is None):
            raise GuidekitError(
                f"{self.name} needs a target: --set {self.name}.target=FILE, or {self.name}.level, "
                "one of them"
            )
        if self.target is not None:
            return self.target
        return torch.full((self._head.config.targets, *run.grid), self.level)

    def _map(self, target: str | Path | Tensor, size: tuple[int, int]) -> Tensor:
        """A target (D, h, w)."""
        if isinstance(target, str | Path):
            return cut(read_target(Path(target)), size)
        target = torch.as_tensor(target, dtype=torch.float32)
        return target[None] if target.ndim == 2 else target

    def energy(self, step: Step) -> Tensor:
        """Mean squared difference (B,) of what the head reads and the target, in its deviations."""
        kind = torch.promote_types(step.z.dtype, torch.float32)
        self._head.to(kind)
        maps = {s: m.to(kind) for s, m in step.cond.features(self._read).items()}
        return self._head.loss(self._seen(maps, step), self._target.to(kind))

    def _seen(self, maps: dict[str, Tensor], step: Step) -> Tensor:
        """What the head reads, at the run's grid."""
        found = self._head(maps, float(step.timestep))
        grid = tuple(self._target.shape[-2:])
        return torch.stack([at_grid(x, grid) for x in found])

    @classmethod
    def example(cls) -> "Readout":
        """A head that nobody fitted, on any backbone."""
        return cls(head=Path(RANDOM), level=0.5, stop=1.0)

    @classmethod
    def example_condition(cls) -> Condition:
        """Nothing but a prompt: the condition is the plugin's own."""
        return Condition("a red circle")


@hookimpl
def register_guidance(register):
    """Offers `readout`."""
    register("readout", Readout)
