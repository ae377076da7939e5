"""Perturbed-attention guidance: away from a picture whose self-attention sees only itself.

Ahn, Cho, Min, Jang, Kim, Kim, Park, Jin, Kim: Self-rectifying diffusion sampling with
perturbed-attention guidance, ECCV 2024, arXiv:2403.17377. In the perturbed branch the map of
self-attention in the middle block is the identity, so each pixel keeps its own value.
"""

from dataclasses import dataclass

import torch

from guidekit import AttentionCall, Branch, Perturbed, Run, Step, hookimpl


@dataclass(kw_only=True)
class PerturbedAttention(Perturbed):
    """Pushes away from the output under identity self-attention."""

    scale: float = 3.0  # s, added to classifier-free guidance
    sites: str = ""  # comma-separated wildcards of self-attention; "" is the middle

    def prepare(self, run: Run) -> None:
        """Finds the self-attention sites."""
        run.tap_attention(self, self.middle_sites(run, self.sites, "attention"))

    def edit_attention(self, step: Step, branch: Branch, call: AttentionCall) -> None:
        """P = I; in joint attention among the pixels, which still read the text."""
        family, count = step.run.denoiser.family, call.query.shape[2]
        if family.order == "cross":
            call.identity()
            return
        pixels = family.rows(count, step.run.text_length)
        shut = torch.zeros(count, count, device=call.query.device)
        shut[pixels, pixels] = float("-inf")
        shut.fill_diagonal_(0)
        call.bias(shut[None, None])


@hookimpl
def register_guidance(register):
    """Offers `pag`."""
    register("pag", PerturbedAttention)
