"""Layout guidance: attention to a phrase lies in its mask, by moves of z itself.

Chen, Laina, Vedaldi: Training-Free Layout Control with Cross-Attention Guidance, WACV 2024,
arXiv:2304.03373, eq. 1 (backward guidance): E = (1 - share of A inside)^2, where the share is a
mean over heads; z moves against its gradient a few times in each of the first steps. Numbers are
those of the released code, which moves by sigma^2 in units of x0; that is s^2 for z = a x0 + s eps.
Its loop looks at the energy of the move before; here it ends at the energy of z as it is.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import Guidance, GuidekitError, Run, Step, hookimpl
from guidekit.toolbox import (
    TokenMaps,
    descend,
    require_segments,
    segment_masks,
    segment_strengths,
)


@dataclass(kw_only=True)
class LayoutGuidance(Guidance):
    """Moves z until the attention of each masked phrase lies in its mask."""

    plugin = "layout-guidance"

    scale: float = 30.0  # size of a move, in units of the noise's variance, along the gradient
    stop: float = 0.2  # fraction of the steps at which it ends
    limit: int = 5  # moves in a step, at most
    until: float = 0.2  # energy of an image that is low enough, from 0 to 1
    # Wildcards of cross-attention; none is the middle and the first block of a UNet's decoder, of
    # other models their layout sites.
    sites: tuple[str, ...] = ()

    needs = ("text",)

    def __post_init__(self):
        super().__post_init__()
        if self.limit < 0:
            raise GuidekitError(f"{self.name}.limit is at least 0, not {self.limit}")

    def prepare(self, run: Run) -> None:
        """Finds the tokens and sites, and draws the masks at their grids."""
        require_segments(run.conditions, self.name)
        sites = run.sites(list(self.sites) or _coarse(run))
        self._maps = TokenMaps(run, self, run.conditions, sites, per_head=True)
        self._masks = {
            grid: segment_masks(run.conditions, *grid).to(run.device) for grid in {*sites.values()}
        }
        self._strengths = segment_strengths(run.conditions).to(run.device)
        tokens = self._maps.wanted.to(self._strengths.dtype)
        counts = (self._strengths != 0).sum(1, keepdim=True).clamp(min=1)
        # Means over the tokens of a phrase, then over the phrases of an image.
        self._shares = tokens / tokens.sum(1, keepdim=True).clamp(min=1)
        self._shares = self._shares * (self._strengths / counts)[:, None]

    def refine(self, step: Step, z: Tensor) -> Tensor:
        """z after at most `limit` moves."""
        amount = self.scale * self.schedule(step.frac) * step.level.s**2
        energy = functools.partial(self._energy, step)
        return descend(step, self, z, energy, amount, self.limit, self.until)

    def _energy(self, step: Step, z: Tensor) -> Tensor:
        """Mean over sites, phrases and tokens of (1 - share inside)^2: (B,)."""
        losses = [self._outside(maps) for maps in self._maps(step, z).values()]
        return torch.stack(losses).mean(0)

    def _outside(self, maps: Tensor) -> Tensor:
        """The energy (B,) of one site's maps (B, heads, K, h, w)."""
        masks = self._masks[tuple(maps.shape[-2:])].to(maps.dtype)
        inside = torch.einsum("bnkhw,bshw->bnks", maps, masks) / maps.sum((3, 4))[..., None]
        return (self._shares.to(maps.dtype) * (1 - inside.mean(1)) ** 2).sum((1, 2))

    @classmethod
    def example(cls) -> "LayoutGuidance":
        """Two moves in every step."""
        return cls(limit=2, until=0.0, stop=1.0)


def _coarse(run: Run) -> list[str]:
    """Cross-attention in the middle and the first decoder block that has some; none elsewhere."""
    names = list(run.sites("cross-attention"))
    decoder = [name for name in names if name.startswith("up_blocks.")]
    first = [name for name in decoder if name.split(".")[1] == decoder[0].split(".")[1]]
    return [name for name in names if name.startswith("mid_block.")] + first


@hookimpl
def register_guidance(register):
    """Offers `layout-guidance`."""
    register("layout-guidance", LayoutGuidance)
