"""Smoothed energy guidance: away from an image whose self-attention is blurred.

Hong: Smoothed energy guidance: Guiding diffusion models with reduced energy curvature of attention,
NeurIPS 2024, arXiv:2408.00760. In the perturbed branch the queries of self-attention in the middle
block are blurred by a Gaussian over the pixels, which blurs the logits over their query pixels. The
released code takes every grid for a square; here it is the site's own. In joint attention (SD3,
Flux) the queries of pixels are blurred and those of text left alone; rotary positions are in them
already, so that there too it is the logits that are blurred.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit import AttentionCall, Branch, GuidekitError, Perturbed, Run, Step, hookimpl
from guidekit.toolbox import pixel_rows


@dataclass(kw_only=True)
class SmoothedEnergy(Perturbed):
    """Pushes away from the output under blurred self-attention."""

    plugin = "seg"

    scale: float = 3.0  # gamma, added to classifier-free guidance
    blur: float | None = None  # standard deviation in pixels of the site; none is infinite, a mean
    sites: tuple[str, ...] = ()  # wildcards of self-attention; none is the middle of the model

    def __post_init__(self):
        super().__post_init__()
        if self.blur is not None and not 0 < self.blur < math.inf:
            raise GuidekitError(f"seg.blur must be positive, or none for infinite, not {self.blur}")

    def prepare(self, run: Run) -> None:
        """Finds the self-attention sites and their grids."""
        names = self.attention_sites(run, self.sites)
        self._grids = run.sites(run.tap_attention(self, names))

    def edit_attention(self, step: Step, branch: Branch, call: AttentionCall) -> None:
        """Blurs the pixels' queries (B, H, N, d) over their grid."""
        rows = pixel_rows(step.run, call)
        query = call.query.clone()
        query[:, :, rows] = self._blurred(query[:, :, rows], self._grids[call.site])
        call.query = query

    def _blurred(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.blur is None:
            return rows.mean(2, keepdim=True)
        picture = rows.unflatten(2, grid).movedim(-1, 2)  # (B, H, d, h, w)
        return blurred(picture, self.blur).movedim(2, -1).flatten(2, 3)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of x (..., h, w) with reflection at the edges.

    The kernel reaches three deviations, or as far as reflection can: 2 * side - 1 pixels.
    """
    flat = x.flatten(0, -3)[:, None]  # (M, 1, h, w)
    for dim, side in ((-2, x.shape[-2]), (-1, x.shape[-1])):
        half = min(math.ceil(3 * sigma), side - 1)
        offsets = torch.arange(-half, half + 1, device=x.device, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel = (kernel / kernel.sum()).to(x.dtype)
        shape, pad = ((-1, 1), (0, 0, half, half)) if dim == -2 else ((1, -1), (half, half, 0, 0))
        flat = F.conv2d(F.pad(flat, pad, mode="reflect"), kernel.view(1, 1, *shape))
    return flat.view_as(x)


@hookimpl
def register_guidance(register):
    """Offers `seg`."""
    register("seg", SmoothedEnergy)
