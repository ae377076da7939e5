"""Autoguidance: away from a bad version of the model itself.

Karras, Aittala, Kynkaanniemi, Lehtinen, Aila, Laine: Guiding a diffusion model with a bad version
of itself, NeurIPS 2024, arXiv:2406.02507. Their bad version is a smaller, less trained model; where
there is none, the same model with dropout, one of the degradations that they try, takes its place.
diffusers drops feed-forward outputs; here what a layer (a transformer block, an attention block of
a UNet2DModel) adds to its input is dropped, so that every model with attention is degraded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import BlockCall, Branch, GuidekitError, Perturbed, Run, Step, hookimpl
from guidekit.toolbox import derived_seed, layers


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
        run.tap_blocks(self, self.layer_sites(run, self.sites or every))

    def edit_block(self, step: Step, branch: Branch, call: BlockCall) -> object:
        """Drops numbers of the block's change and scales the rest up (B, N, C)."""
        whole = call.run()
        kept = call.skip()
        if self.dropout == 1:
            return kept
        if isinstance(whole, Tensor):
            return self._dropped(step, call, kept, whole)
        pairs = zip(kept, whole, strict=True)  # text and pixels of joint blocks; no text at the end
        return tuple(
            None if new is None else self._dropped(step, call, old, new, i)
            for i, (old, new) in enumerate(pairs)
        )

    def _dropped(
        self, step: Step, call: BlockCall, kept: Tensor, whole: Tensor, part: int = 0
    ) -> Tensor:
        # Drawn where the model runs: a hundred million numbers a step are too many to move there.
        tags = (step.index, step.repeat, self.name, call.site, part)
        shape, device = whole.shape[1:], whole.device
        drawn = torch.empty(whole.shape, device=device)
        for row, seed in zip(drawn, step.run.seeds, strict=True):
            generator = torch.Generator(device).manual_seed(derived_seed(seed, *tags))
            torch.rand(shape, generator=generator, out=row)
        mask = drawn >= self.dropout
        return kept + (whole - kept) * mask / (1 - self.dropout)


@hookimpl
def register_guidance(register):
    """Offers `autoguidance`."""
    register("autoguidance", Autoguidance)
