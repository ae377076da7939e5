"""Attention maps of single tokens, read in calls of a guidance's own: for hooks that move z."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.backbones.tokens import segment_weights
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.reads import AttentionRead
from guidekit.run import Run
from guidekit.step import Step


class TokenMaps:
    """Maps of the tokens of segments' phrases, or of `every` word of the text.

    wanted: (B, K, S) bool, which of the K maps belong to which segment. per_head: heads are kept
    apart. Asked for in `prepare`; called with a step and a z (B, C, h, w), it evaluates the
    conditional branch up to the last site and returns the maps of each, (B, K, h, w) or
    (B, heads, K, h, w), with gradient.
    """

    def __init__(
        self,
        run: Run,
        guidance: Guidance,
        conditions: list[Condition],
        sites: dict[str, tuple[int, int]],
        *,
        every: bool = False,
        per_head: bool = False,
    ):
        tokenizers, length = run.denoiser.tokenizers, run.text_length
        own = segment_weights(tokenizers, conditions, length) > 0
        kept = own.any(2).any(0)
        if every:
            kept = torch.ones(length, dtype=torch.bool)
            kept[-1] = False
            first, *_ = tokenizers[0]("a", return_offsets_mapping=True)["offset_mapping"]
            kept[0] = first[0] < first[1]  # CLIP's is the start, T5's a word
        self.wanted: Tensor = own[:, kept].to(run.device)
        chosen = torch.eye(length)[:, kept].expand(len(conditions), -1, -1).to(run.device)
        read = AttentionRead(chosen, sites, per_head=per_head)
        self._guidance, self._read = guidance, run.read(guidance, read, main=False)

    def __call__(self, step: Step, z: Tensor) -> dict[str, Tensor]:
        """The maps of every site at z."""
        found = step.denoise(step.model_input(z), step.timestep, self._guidance, stop=True)
        return {site: m.to(z.dtype) for site, m in found.attention(self._read).items()}


def sites_of_one_grid(
    run: Run, patterns: list[str], resolution: int, who: str
) -> dict[str, tuple[int, int]]:
    """Attention sites with the grid whose longer side is `resolution`.

    0 is the grid nearest to a quarter of the latents'. Raises GuidekitError if no site has it.
    """
    sites = run.sites(patterns)
    sides = sorted({max(grid) for grid in sites.values()})
    wanted = resolution or max(run.grid) // 4
    side = min(sides, key=lambda s: abs(math.log(s / wanted)))
    if resolution and side != wanted:
        exist = ", ".join(map(str, sides))
        raise GuidekitError(f"{who}.resolution {wanted}: the sites have {exist}")
    return {site: grid for site, grid in sites.items() if max(grid) == side}


def smoothed(maps: Tensor, std: float) -> Tensor:
    """Maps (B, S, h, w) under a Gaussian of 3x3 pixels, mirrored at the edges."""
    ends = math.exp(-0.5 / std**2)
    line = maps.new_tensor([ends, 1.0, ends])
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(maps, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view_as(maps)
