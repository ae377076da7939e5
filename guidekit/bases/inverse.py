"""Bases of guidance by what an image should give: a measurement y = A x + noise, or any loss.

`InverseGuidance` has a linear operator and a measurement, `LossGuidance` these or a loss of images;
methods differ in what they make of the residual and its gradient. A survey of them is Ye et al.
2024 (TFG, arXiv:2409.15761).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guidekit.bases.named import named
from guidekit.bases.operators import Downsampling, Grey, Inpainting, LinearOperator, as_operator
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.masks import load_mask, resize_mask
from guidekit.options import ImportPath
from guidekit.references import read_references
from guidekit.run import Run
from guidekit.step import Step

OPERATORS = ("downsampling", "inpainting", "grey")
Loss = Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class InverseGuidance(Guidance):
    """Guidance by a measurement: operator, measured image, residual.

    `Condition(targets={NAME: y})` gives each image its own, as `operator.forward` makes them,
    (3, H, W) in [-1, 1] or smaller.
    """

    # downsampling, inpainting, grey, MODULE:NAME of another, or one
    operator: ImportPath | object = "downsampling"
    measurement: Path = Path("")  # image that was measured; scene-3 is a built-in one
    down: int = 4  # of downsampling: side of a square in pixels that becomes one
    hole: tuple[float, ...] = (0.25, 0.25, 0.75, 0.75)  # inpainting: left, top, right, bottom
    mask: Path = Path("")  # inpainting: image that is white where nothing is known; not the hole

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.down < 1:
            raise GuidekitError(f"{self.name}.down is at least 1, not {self.down}")
        if len(self.hole) != 4 or not _is_box(*self.hole):
            raise GuidekitError(
                f"{self.name}.hole is left, top, right and bottom in fractions, not {self.hole}"
            )

    @property
    def rule(self) -> tuple[Any, ...]:
        """Nobody else's: an operator and a loss are compared with none."""
        return ("score",) if not self.overrides("push") else (type(self), id(self))

    def prepare(self, run: Run) -> None:
        """Makes the operator and reads the measurement.

        Raises GuidekitError without one, and for one that is not what the operator measures.
        """
        # Pixel models may be of one channel, as digits are.
        channels = run.latent_shape[0] if run.denoiser.factor == 1 else 3
        self._linear = self._made(run, channels)
        with torch.no_grad():
            blank = torch.zeros(1, channels, *run.size, device=run.device)
            shape = self._linear.forward(blank).shape[1:]
        own = run.targets(self.name)
        y = self._read(shape) if own is None else torch.stack(own)
        if y.shape[1:] != shape:
            raise GuidekitError(
                f"{self.name}: the measurement is {tuple(y.shape[1:])}, and its operator measures "
                f"{tuple(shape)}"
            )
        self._measured = y.to(run.device)

    def residual(self, pixels: Tensor) -> Tensor:
        """y - A x (B, ...) of images (B, 3, H, W) in [-1, 1]."""
        found = self._linear.forward(pixels)
        return self._measured.to(found) - found

    @staticmethod
    def unit(step: Step) -> float:
        """Factor on a move of z along a gradient at z that makes it one of the model's input.

        Papers write for VP, whose a^2 + s^2 is 1; 1 but for schedulers that carry a = 1.
        """
        return step.level.norm * step.next_level.norm

    def _made(self, run: Run, channels: int) -> LinearOperator:
        """The operator for images of the run's size."""
        height, width = run.size
        if self.operator == "downsampling":
            if height % self.down or width % self.down:
                raise GuidekitError(f"{self.name}.down={self.down} does not divide {run.size}")
            return Downsampling(self.down)
        if self.operator == "inpainting":
            return Inpainting(self._known(height, width).to(run.device))
        if self.operator == "grey":
            return Grey(channels)
        where = f"{self.name}.operator"
        given = named(self.operator, where, dict.fromkeys(OPERATORS))
        if isinstance(given, nn.Module):  # deepinv's physics are modules
            given = copy.deepcopy(given).to(run.device)
        return as_operator(given, run.size, where)

    def _known(self, height: int, width: int) -> Tensor:
        """Where pixels are known (H, W): all but the mask's, or the hole's."""
        if self.mask != Path(""):
            return (resize_mask(load_mask(self.mask), height, width) < 0.5).float()
        left, top, right, bottom = self.hole
        known = torch.ones(height, width)
        rows = slice(round(top * height), round(bottom * height))
        known[rows, round(left * width) : round(right * width)] = 0
        return known

    def _read(self, shape: torch.Size) -> Tensor:
        """The measurement of the file (1, ...); raises GuidekitError for none."""
        if self.measurement == Path(""):
            raise GuidekitError(
                f"{self.name} needs a measurement: --set {self.name}.measurement=FILE"
            )
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise GuidekitError(
                f"{self.name}: its operator measures {tuple(shape)}, which is no image; give it "
                f"by Condition(targets={{{self.name!r}: y}})"
            )
        images = read_references([self.measurement], (shape[1], shape[2]))
        images = images if shape[0] == 3 else images.mean(1, keepdim=True)
        return self._linear.forward(images) if self.operator == "inpainting" else images

    @classmethod
    def example(cls) -> "InverseGuidance":
        """A built-in image, made smaller."""
        return cls(measurement=Path("scene-3"))


@dataclass(kw_only=True)
class LossGuidance(InverseGuidance):
    """Guidance by a distance of images: to a measurement, or a loss in its place."""

    # MODULE:NAME of a function of images (B, 3, H, W) in [-1, 1] that gives (B,), lower being
    # better, or of a network; in place of a measurement
    loss: ImportPath | Loss = ""

    def prepare(self, run: Run) -> None:
        """Finds the loss, or what is measured; raises GuidekitError for neither."""
        self._loss: Loss | None = None
        if self.loss == "":
            super().prepare(run)
            return
        self._loss = named(self.loss, f"{self.name}.loss")
        if isinstance(self._loss, nn.Module):
            self._loss = copy.deepcopy(self._loss).to(run.device).eval().requires_grad_(False)
        if not callable(self._loss):
            raise GuidekitError(f"{self.name}.loss is a {type(self._loss).__name__}, no function")

    def distance(self, step: Step, x0: Tensor) -> Tensor:
        """The loss (B,) of clean latents x0 (B, C, h, w), or the norm of the residual."""
        pixels = step.decode(x0)
        if self._loss is None:
            return self.residual(pixels).flatten(1).norm(dim=1)
        return self._checked(self._loss(pixels), len(x0))

    def squared(self, step: Step, x0: Tensor) -> Tensor:
        """The loss (B,), or the square of the residual's norm."""
        pixels = step.decode(x0)
        if self._loss is None:
            return self.residual(pixels).square().flatten(1).sum(1)
        return self._checked(self._loss(pixels), len(x0))

    def gradient(self, x0: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient (B, C, h, w) of a loss (B,) at x0 itself, not through the denoiser."""
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            (found,) = torch.autograd.grad(loss(x0).sum(), x0)
        return found

    def _checked(self, value: Tensor, count: int) -> Tensor:
        if value.shape != (count,):
            raise GuidekitError(
                f"{self.name}.loss gives {tuple(value.shape)}; it must give one number per image, "
                f"({count},)"
            )
        return value


def _is_box(left: float, top: float, right: float, bottom: float) -> bool:
    return 0 <= left < right <= 1 and 0 <= top < bottom <= 1
