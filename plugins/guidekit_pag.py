"""Perturbed-attention guidance: away from an image whose self-attention sees only itself.

Ahn, Cho, Min, Jang, Kim, Kim, Park, Jin, Kim: Self-rectifying diffusion sampling with
perturbed-attention guidance, ECCV 2024, arXiv:2403.17377. In the perturbed branch the map of
self-attention in the middle block is the identity, so each pixel keeps its own value. In joint
attention (SD3, Flux) that holds among pixels, and pixels still read the text, as in diffusers'
StableDiffusion3PAGPipeline.
"""

from dataclasses import dataclass

from guidekit import AttentionCall, Branch, Perturbed, Run, Step, hookimpl
from guidekit.toolbox import pixel_rows


@dataclass(kw_only=True)
class PerturbedAttention(Perturbed):
    """Pushes away from the output under identity self-attention."""

    plugin = "pag"

    scale: float = 3.0  # s, added to classifier-free guidance
    sites: tuple[str, ...] = ()  # wildcards of self-attention; none is the middle of the model

    def prepare(self, run: Run) -> None:
        """Finds the self-attention sites."""
        run.tap_attention(self, self.attention_sites(run, self.sites))

    def edit_attention(self, step: Step, branch: Branch, call: AttentionCall) -> None:
        """P = I among the pixels."""
        call.identity(pixel_rows(step.run, call))


@hookimpl
def register_guidance(register):
    """Offers `pag`."""
    register("pag", PerturbedAttention)
