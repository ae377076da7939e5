"""Skip-layer guidance: away from an image drawn without some of the layers.

Stability AI's reference code of Stable Diffusion 3.5 (https://github.com/Stability-AI/sd3.5, 2024),
whose scale and window are the defaults; Hyung, Kim, Hong, Kim, Choo: Spatiotemporal skip guidance
for enhanced video diffusion sampling, CVPR 2025, arXiv:2411.18664, says why it works.
"""

from dataclasses import dataclass

from guidekit import BlockCall, Branch, Perturbed, Run, Step, hookimpl


@dataclass(kw_only=True)
class SkipLayer(Perturbed):
    """Pushes away from the output with blocks skipped."""

    plugin = "slg"

    scale: float = 2.8  # added to classifier-free guidance
    start: float = 0.01  # fraction of the steps at which it begins
    stop: float = 0.2  # fraction of the steps at which it ends
    sites: tuple[str, ...] = ()  # wildcards of layers; none is the middle of the model

    def prepare(self, run: Run) -> None:
        """Finds the layers."""
        run.tap_blocks(self, self.layer_sites(run, self.sites))

    def edit_block(self, step: Step, branch: Branch, call: BlockCall) -> object:
        """The block's input for its output."""
        return call.skip()

    @classmethod
    def example(cls) -> "SkipLayer":
        """Guides every step of a short run."""
        return cls(start=0.0, stop=1.0)


@hookimpl
def register_guidance(register):
    """Offers `slg`."""
    register("slg", SkipLayer)
