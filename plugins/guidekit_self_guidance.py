"""Self-guidance: where an object is, how large, of what shape and look, as attention shows it.

Epstein, Jabri, Poole, Efros, Holynski: Diffusion Self-Guidance for Controllable Image Generation,
NeurIPS 2023, arXiv:2306.00986, section 3: differentiable properties of the maps of a phrase (and of
features under them) are pulled to wanted values. Those are the masks' here; shape and look are
also taken from another image: the first one of the group, of the same noise (`latents`) and another
layout, say, which is drawn as it would be alone.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit import (
    FeatureRead,
    Guidance,
    GuidekitError,
    Run,
    Step,
    average_maps,
    hookimpl,
)
from guidekit.toolbox import (
    require_segments,
    segment_masks,
    segment_strengths,
    segment_weights,
)

STEEPNESS = 10.0  # of the soft threshold


@dataclass(kw_only=True)
class SelfGuidance(Guidance):
    """Pulls the centroid, size, shape and look of each phrase to what is wanted.

    In a group of images (`Condition.group`) the first is left alone, and is what the others take
    the look from, and the shape where `shape_of=first`.
    """

    plugin = "self-guidance"

    scale: float = 30.0  # strength
    position: float = 1.0  # weight of the centroid, to that of the mask
    size: float = 1.0  # weight of the size, to that of the mask
    shape: float = 0.0  # weight of the shape, to that of the mask, or of the first of the group
    look: float = 0.0  # weight of the appearance, to that in the first image of the group
    shape_of: Literal["mask", "first"] = "mask"  # what shapes are pulled to
    sites: tuple[str, ...] = ()  # wildcards of cross-attention; none is where the layout is
    block: str = ""  # the block whose features are the look; none is the last with attention

    needs = ("text",)
    graph = "features"
    grouped = True

    def prepare(self, run: Run) -> None:
        """Finds tokens, sites, the targets of the masks, and the first image of every group."""
        require_segments(run.conditions, self.name)
        weights = segment_weights(run.denoiser.tokenizers, run.conditions, run.text_length)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        self._maps = run.attention_read(self, weights, run.sites(list(self.sites)))
        self._look = None
        if self.look:
            blocks = list(run.blocks([self.block] if self.block else "blocks"))
            self._look = run.read(self, FeatureRead((blocks[-1],)))
        first = {row: members[0] for members in run.groups for row in members}
        self._first = torch.tensor([first[row] for row in range(len(first))], device=run.device)
        own = self._first == torch.arange(len(first), device=run.device)
        alone = torch.tensor([len(m) == 1 for m in run.groups for _ in m], device=run.device)
        self._takes = ~own  # those that have another image to take from
        self._guided = self._takes | alone[self._order(run)]
        if (self.look or self.shape_of == "first") and not self._takes.any():
            raise GuidekitError(
                f"{self.name} takes look and shape from the first image of a group, and every "
                "image is alone; use Condition.group or --particles"
            )
        self._masks = segment_masks(run.conditions, *run.grid).to(run.device)
        self._strengths = segment_strengths(run.conditions).to(run.device)

    def _order(self, run: Run) -> Tensor:
        """For every image its place in the list of all groups' members."""
        members = [row for group in run.groups for row in group]
        return torch.tensor(members, device=run.device).argsort()

    def energy(self, step: Step) -> Tensor:
        """Weighted distances of the properties to the wanted ones (B,), 0 of first images."""
        maps = average_maps(step.cond.attention(self._maps)).to(step.z.dtype)  # (B, S, h, w)
        shapes = soft_shape(maps)
        masks = F.interpolate(self._masks.to(maps), maps.shape[-2:], mode="area")
        lost = self.position * (centroid(maps) - centroid(masks)).abs().mean(-1)
        lost = lost + self.size * (shapes - masks).mean((2, 3)).abs()
        wanted = masks if self.shape_of == "mask" else shapes.detach()[self._first]
        lost = lost + self.shape * (shapes - wanted).abs().mean((2, 3))
        if self._look is not None:
            lost = lost + self.look * self._looks_apart(step, shapes)
        guided = self._guided.to(lost)
        return guided * (self._strengths.to(lost) * lost).sum(1)

    def _looks_apart(self, step: Step, shapes: Tensor) -> Tensor:
        """How far features under the shapes are from the first image's (B, S), 0 if alone."""
        (features,) = step.cond.features(self._look).values()
        features = features.to(shapes.dtype)
        under = F.interpolate(shapes, features.shape[-2:], mode="bilinear")
        size = under.sum((2, 3)).clamp(min=torch.finfo(under.dtype).tiny)  # 0: no such segment
        look = torch.einsum("bshw,bchw->bsc", under, features) / size[..., None]
        apart = (look - look.detach()[self._first]).abs().mean(-1)
        return apart * self._takes.to(apart)[:, None]


def soft_shape(maps: Tensor) -> Tensor:
    """Maps (B, S, h, w) softly cut at half of their range, from 0 to 1 (eq. 5)."""
    return normalised(torch.sigmoid(STEEPNESS * (normalised(maps) - 0.5)))


def normalised(maps: Tensor) -> Tensor:
    """Maps (B, S, h, w) whose values reach from 0 to 1."""
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def centroid(maps: Tensor) -> Tensor:
    """Mean place (B, S, 2), x and y from 0 to 1, of the mass of maps (B, S, h, w) (eq. 4)."""
    h, w = maps.shape[-2:]
    y = (torch.arange(h, device=maps.device) + 0.5).to(maps) / h
    x = (torch.arange(w, device=maps.device) + 0.5).to(maps) / w
    mass = maps.sum((2, 3)).clamp(min=torch.finfo(maps.dtype).tiny)
    places = torch.stack([(maps.sum(2) * x).sum(-1), (maps.sum(3) * y).sum(-1)], -1)
    return places / mass[..., None]


@hookimpl
def register_guidance(register):
    """Offers `self-guidance`."""
    register("self-guidance", SelfGuidance)
