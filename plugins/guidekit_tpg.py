"""Token perturbation guidance: away from an image some of whose layers got their tokens shuffled.

Rajabi, Mehraban, Sadat, Taati: Token Perturbation Guidance for Diffusion Models, 2025,
arXiv:2506.10036, section 4: in the perturbed branch the tokens that enter a layer are shuffled,
which keeps their norm and destroys the local structure; the scale is that of the released code.
Here every image has a shuffling of its own for each step and layer, and in joint attention (SD3,
Flux) pixels are shuffled and text is left alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import BlockCall, Branch, GuidekitError, Perturbed, Run, Step, hookimpl
from guidekit.toolbox import derived_seed, layers


@dataclass(kw_only=True)
class TokenPerturbation(Perturbed):
    """Pushes away from the output under shuffled tokens."""

    plugin = "tpg"

    scale: float = 3.0  # gamma, added to classifier-free guidance
    # Wildcards of layers; none is the encoder: the down blocks of a UNet, else the first half.
    sites: tuple[str, ...] = ()

    def prepare(self, run: Run) -> None:
        """Finds the layers and their grids."""
        every = layers(run.denoiser.model)
        encoder = [site for site in every if site.startswith("down_blocks.")]
        names = self.layer_sites(run, self.sites or tuple(encoder or every[: len(every) // 2]))
        self._grids = run.blocks(run.tap_blocks(self, names))

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Adds the branch, and shuffles the tokens of this step."""
        run = step.run
        self._orders = {
            site: torch.stack(
                [_shuffled(h * w, seed, step.index, step.repeat, site) for seed in run.seeds]
            ).to(run.device)
            for site, (h, w) in self._grids.items()
        }
        return super().branches(step, branches)

    def edit_block(self, step: Step, branch: Branch, call: BlockCall) -> object:
        """The block's output for shuffled tokens."""
        order = self._orders[call.site]
        named = "hidden_states" in call.kwargs
        hidden = call.kwargs["hidden_states"] if named else call.args[0]
        if hidden.ndim == 3 and hidden.shape[1] != order.shape[1]:
            raise GuidekitError(
                f"{self.name} shuffles pixels, and {call.site} holds text and pixels in one "
                "sequence; use pag, seg or slg with this model"
            )
        shuffled = _taken(hidden, order)
        if named:
            call.kwargs["hidden_states"] = shuffled
        else:
            call.args = (shuffled, *call.args[1:])
        return call.run()


def _shuffled(count: int, *tags: int | str) -> Tensor:
    """An order of so many tokens, from a seed and tags."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(*tags)))


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Tokens (B, N, C), or pixels (B, C, h, w), in the order (B, N)."""
    if x.ndim == 3:
        return x.gather(1, order[..., None].expand_as(x))
    flat = x.flatten(2)
    return flat.gather(2, order[:, None].expand_as(flat)).view_as(x)


@hookimpl
def register_guidance(register):
    """Offers `tpg`."""
    register("tpg", TokenPerturbation)
