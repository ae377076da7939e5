"""Guidance away from a worse version of the same model: its conditional branch, perturbed.

A subclass changes attention or blocks of one further branch. What it adds to the combined output is
scale * (conditional - perturbed), the form that PAG (Ahn et al. 2024, arXiv:2403.17377), SEG and
skip-layer guidance share, and that of autoguidance (Karras et al. 2024, arXiv:2406.02507) with
their weight w = 1 + scale.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from guidekit.attention.call import AttentionCall
from guidekit.backbones.records import site_grid
from guidekit.backbones.sites import layers, middle, named_sites, self_attention
from guidekit.branches import Branch
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.run import Run
from guidekit.step import Step


@dataclass(kw_only=True)
class Perturbed(Guidance):
    """Pushes the output away from that of a perturbed conditional branch.

    The branch carries the guidance's name and stands in a group of its own, so that other plugins'
    scales and regions leave it alone. It costs one more row of the denoiser per image; in
    UNets, SD3 and Flux only from the block of its first edit on, until which it shares the
    conditional branch's.
    """

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Adds the branch; raises GuidekitError where no conditional one is left to perturb."""
        cond = next((b for b in branches if b.name == "cond"), None)
        if cond is None:
            names = ", ".join(b.name for b in branches)
            raise GuidekitError(
                f"{self.name} perturbs the branch 'cond', which another plugin has replaced by "
                f"{names}; use them in two windows of steps, or without each other"
            )
        return [*branches, Branch(self.name, cond.prompts, x=cond.x, group=self.name)]

    def touches(self, branch: Branch) -> bool:
        """Its own branch and no other."""
        return branch.name == self.name

    def combine(self, step: Step, outs: dict[str, Tensor], combined: Tensor) -> Tensor:
        """Adds the difference of the conditional and the perturbed output."""
        amount = self.scale * self.schedule(step.frac)
        return combined + amount * (outs["cond"] - outs[self.name])

    def attention_sites(self, run: Run, wanted: tuple[str, ...]) -> list[str]:
        """Self-attention that the wildcards `wanted` name; the middle's if empty.

        Raises GuidekitError for a site that has none, and for a model without any.
        """
        model = run.denoiser.model
        possible = self_attention(model, run.denoiser.family)
        if not possible:
            raise GuidekitError(
                f"{self.name} perturbs self-attention with a softmax, and {type(model).__name__} "
                "has none; use slg or autoguidance"
            )
        return self._chosen(model, wanted, "attention", possible) or middle(model, possible)

    def layer_sites(self, run: Run, wanted: tuple[str, ...]) -> list[str]:
        """Layers that the wildcards `wanted` name; the middle ones if empty.

        Raises GuidekitError for a site that is no layer.
        """
        model = run.denoiser.model
        possible = layers(model)
        return self._chosen(model, wanted, "block", possible) or middle(model, possible)

    def _chosen(
        self, model: nn.Module, wanted: tuple[str, ...], kind: str, possible: list[str]
    ) -> list[str]:
        """Sites of the wildcards, which must be among the possible ones; none if there are none."""
        chosen = named_sites(model, wanted, kind)
        if others := [site for site in chosen if site not in possible]:
            raise GuidekitError(
                f"{self.name}.sites: {', '.join(others)} cannot be perturbed by it; those that "
                f"can: {', '.join(possible)}"
            )
        return chosen


def pixel_rows(run: Run, call: AttentionCall) -> slice:
    """The queries of a self-attention call that are pixels; the others are text.

    Branches have texts of other lengths, and all of them the same pixels.
    """
    family, count = run.denoiser.family, call.query.shape[2]
    if family.order == "cross" or not any(fnmatchcase(call.site, s) for s in family.cross_sites):
        return slice(None)
    pixels = math.prod(site_grid(run.denoiser.model, call.site, *run.grid))
    return family.rows(count, count - pixels - family.further)
