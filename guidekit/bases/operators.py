"""Linear operators of inverse problems: what a measurement is of an image, y = A x + noise.

Images are (B, 3, H, W) in [-1, 1]. Inpainting, downsampling and grey are built in; any of deepinv's
linear physics, or an operator of one's own, serves by its A and A^T.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.errors import GuidekitError

ROUNDS = 50  # of conjugate gradients


class LinearOperator:
    """A linear map A of images: `forward` is A, `adjoint` A^T, `pinv` A^+.

    A subclass writes `forward` and `adjoint`; `solve` is by conjugate gradients, row by row, unless
    it knows better.
    """

    def forward(self, x: Tensor) -> Tensor:
        """What is measured (B, ...) of images x (B, 3, H, W)."""
        raise NotImplementedError

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, images (B, 3, H, W)."""
        raise NotImplementedError

    def solve(self, y: Tensor, ridge: float) -> Tensor:
        """(A A^T + ridge)^-1 y, of y in the range of A (B, ...)."""
        found, rest = torch.zeros_like(y), y
        way, size = rest, _dot(rest, rest)
        for _ in range(ROUNDS):
            image = self.forward(self.adjoint(way)) + ridge * way
            step = size / _dot(way, image).clamp(min=torch.finfo(y.dtype).tiny)
            found, rest = found + step * way, rest - step * image
            before, size = size, _dot(rest, rest)
            way = rest + size / before.clamp(min=torch.finfo(y.dtype).tiny) * way
        return found

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y, the smallest images (B, 3, H, W) of which y is measured."""
        return self.adjoint(self.solve(y, 0.0))


class Inpainting(LinearOperator):
    """The pixels where `known` (H, W) is 1; the others are measured as 0."""

    def __init__(self, known: Tensor):
        self.known = known

    def forward(self, x: Tensor) -> Tensor:
        """The known pixels (B, 3, H, W)."""
        return x * self.known.to(x)

    adjoint = forward

    def solve(self, y: Tensor, ridge: float) -> Tensor:
        """A A^T is one where pixels are known."""
        return self.forward(y) / (1 + ridge)


class Downsampling(LinearOperator):
    """Means over squares of `factor` pixels a side."""

    def __init__(self, factor: int):
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The smaller images (B, 3, H / factor, W / factor)."""
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        """Each value on its square, over the square's number of pixels."""
        large = F.interpolate(y, scale_factor=float(self.factor), mode="nearest")
        return large / self.factor**2

    def solve(self, y: Tensor, ridge: float) -> Tensor:
        """A A^T is one over the number of pixels of a square."""
        return y / (self.factor**-2 + ridge)


class Grey(LinearOperator):
    """The mean of the channels; its inverse problem is colourisation."""

    def __init__(self, channels: int = 3):
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Grey images (B, 1, H, W)."""
        return x.mean(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """A third of it in each channel."""
        return y.expand(-1, self.channels, -1, -1) / self.channels

    def solve(self, y: Tensor, ridge: float) -> Tensor:
        """A A^T is a third."""
        return y / (1 / self.channels + ridge)


class Physics(LinearOperator):
    """Linear physics of deepinv: an object with A, A_adjoint and, where it has one, A_dagger."""

    def __init__(self, physics: Any):
        self.physics = physics

    def forward(self, x: Tensor) -> Tensor:
        """What is measured, without the physics' noise."""
        return self.physics.A(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """The physics' adjoint."""
        return self.physics.A_adjoint(y)

    def pinv(self, y: Tensor) -> Tensor:
        """The physics' own pseudo-inverse."""
        dagger = getattr(self.physics, "A_dagger", None)
        return super().pinv(y) if dagger is None else dagger(y)


def as_operator(given: Any, size: tuple[int, int], where: str) -> LinearOperator:
    """A LinearOperator of one, of deepinv's linear physics, or of a function of size (H, W).

    Raises GuidekitError for anything else.
    """
    if isinstance(given, LinearOperator):
        return given
    if hasattr(given, "A") and hasattr(given, "A_adjoint"):
        return Physics(given)
    if isinstance(given, Callable):  # type: ignore[arg-type]
        return as_operator(given(size), size, where)
    raise GuidekitError(
        f"{where} is a {type(given).__name__}; it must be a guidekit.toolbox.LinearOperator, "
        "linear physics of deepinv (with A and A_adjoint), or a function of (H, W) that gives one"
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows, that broadcast (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))
