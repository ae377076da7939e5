"""TCFG: the null prediction keeps only what it shares with the conditional one.

Kwon et al.: TCFG: Tangential Damping Classifier-free Guidance, CVPR 2025, arXiv:2503.18137.
The null prediction is projected onto the first right singular vector of the matrix of both
predictions, image by image; classifier-free guidance starts from what is left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import Step, hookimpl
from guidekit.toolbox import Contrast


@dataclass(kw_only=True)
class TangentialDamping(Contrast):
    """Damps the null branch across the direction of both predictions."""

    plugin = "tcfg"

    def contrasted(self, step: Step, cond: Tensor, null: Tensor, weight: float) -> Tensor:
        """Classifier-free guidance from the projected null."""
        null = shared(cond, null)
        return null + weight * (cond - null)


def shared(cond: Tensor, null: Tensor) -> Tensor:
    """The null's (B, C, h, w) part along the first right singular vector of [cond; null]."""
    both = torch.stack([cond.flatten(1), null.flatten(1)], 1)  # (B, 2, N)
    gram = both @ both.mT
    left = torch.linalg.eigh(gram)[1][:, :, -1:]  # of the largest singular value (B, 2, 1)
    along = left.mT @ both  # (B, 1, N), the right one times the singular value
    share = (gram[:, 1:] @ left) / (left.mT @ gram @ left)
    return (share * along).reshape(null.shape)


@hookimpl
def register_guidance(register):
    """Offers `tcfg`."""
    register("tcfg", TangentialDamping)
