"""Autoguidance: away from a bad version of the model itself.

Karras, Aittala, Kynkaanniemi, Lehtinen, Aila, Laine: Guiding a diffusion model with a bad version
of itself, NeurIPS 2024, arXiv:2406.02507. Their bad version is a smaller, less trained model; where
there is none, the same model with dropout, one of the degradations that they try, takes its place.
diffusers drops feed-forward outputs; here what a layer (a transformer block, an attention block of
a UNet2DModel) adds to its input is dropped, so that every model with attention is degraded.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import BlockCall, Branch, GuidekitError, Perturbed, Run, Step, hookimpl
from guidekit.toolbox import derived_seed, layers

MASK = 0xFFFFFFFF  # 32 bits


@dataclass(kw_only=True)
class Autoguidance(Perturbed):
    """Pushes away from the output of the model with dropout in its layers.

    The paper's weight is 1 + scale. What is dropped depends on the image's seed, the step, the site
    and the kind of device alone.
    """

    scale: float = 1.0  # w - 1, added to classifier-free guidance
    dropout: float = 0.1  # share of what a block adds that is dropped; 1 skips the block
    sites: tuple[str, ...] = ()  # wildcards of layers; none is every layer

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.dropout <= 1:
            raise GuidekitError(
                f"autoguidance.dropout lies in 0 to 1, without 0, not {self.dropout}"
            )

    def prepare(self, run: Run) -> None:
        """Finds the blocks."""
        every = tuple(layers(run.denoiser.model))
        sites = run.tap_blocks(self, self.layer_sites(run, self.sites or every))
        parts = [name for site in sites for name in (site, f"{site}.0", f"{site}.1")]
        self._numbers = {name: derived_seed(0, name) & MASK for name in parts}

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Adds the branch, and draws the images' seeds of this step."""
        run = step.run
        drawn = [derived_seed(s, step.index, step.repeat, self.name) & MASK for s in run.seeds]
        self._seeds = torch.tensor(drawn, device=run.device)
        return super().branches(step, branches)

    def edit_block(self, step: Step, branch: Branch, call: BlockCall) -> object:
        """Drops numbers of the block's change and scales the rest up (B, N, C)."""
        whole = call.run()
        old = call.skip()
        if self.dropout == 1:
            return old
        if isinstance(whole, Tensor):
            return self._dropped(call.site, old, whole)
        pairs = zip(old, whole, strict=True)  # text and pixels of joint blocks; no text at the end
        return tuple(
            None if new is None else self._dropped(f"{call.site}.{i}", before, new)
            for i, (before, new) in enumerate(pairs)
        )

    def _dropped(self, site: str, old: Tensor, whole: Tensor) -> Tensor:
        mask = kept(self._seeds, self._numbers[site], tuple(whole.shape[1:]), self.dropout)
        return old + (whole - old) * mask / (1 - self.dropout)


def kept(seeds: Tensor, number: int, shape: tuple[int, ...], dropout: float) -> Tensor:
    """Masks (B, *shape) that drop a share, each from its image's seed (B,) and a site's number.

    Drawn where the numbers are used, from a count: the finaliser of MurmurHash3 (Appleby 2011)
    of a position and a seed. The same on every device and in every batch, and no generator, which
    a compiled denoiser could not hold.
    """
    places = torch.arange(math.prod(shape), device=seeds.device) * 0x9E3779B1
    own = _mixed(seeds ^ number)[:, None]
    return (_mixed((places + own) & MASK) >= int(dropout * 2**32)).view(-1, *shape)


def _mixed(x: Tensor) -> Tensor:
    """Numbers below 2^32, all bits of each spread over it."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & MASK
    return x ^ (x >> 16)


@hookimpl
def register_guidance(register):
    """Offers `autoguidance`."""
    register("autoguidance", Autoguidance)
