"""Guidance away from a worse version of the same model: its conditional branch, perturbed.

A subclass changes attention or blocks of one further branch. What it adds to the combined output is
scale * (conditional - perturbed), the form that PAG (Ahn et al. 2024, arXiv:2403.17377), SEG and
skip-layer guidance share, and that of autoguidance (Karras et al. 2024, arXiv:2406.02507) with
their weight w = 1 + scale.
"""

from dataclasses import dataclass

from torch import Tensor

from guidekit.guidance import Branch, Guidance
from guidekit.run import Run
from guidekit.step import Step
from guidekit.taps import find_sites


@dataclass(kw_only=True)
class Perturbed(Guidance):
    """Pushes the output away from that of a perturbed conditional branch.

    The branch carries the guidance's name and stands in a group of its own, so that other plugins'
    scales and regions leave it alone. It costs one more row of the denoiser per picture.
    """

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Adds the branch; raises ValueError where no conditional one is left to perturb."""
        cond = next((b for b in branches if b.name == "cond"), None)
        if cond is None:
            names = ", ".join(b.name for b in branches)
            raise ValueError(
                f"{self.name} perturbs the branch 'cond', which another plugin has replaced by "
                f"{names}; use them in two windows of steps, or without each other"
            )
        return [*branches, Branch(self.name, cond.prompts, x=cond.x, group=self.name)]

    def touches(self, branch: Branch) -> bool:
        """Its own branch and no other."""
        return branch.name == self.name

    def combine(self, step: Step, outs: dict[str, Tensor], combined: Tensor) -> Tensor:
        """Adds the difference of the conditional and the perturbed output."""
        step.run.account.edit(self.name)
        amount = self.scale * self.weight(step.frac)
        return combined + amount * (outs["cond"] - outs[self.name])

    def possible_sites(self, run: Run, kind: str) -> list[str]:
        """Sites that the method can perturb: self-attention ("attention") or blocks ("block").

        Raises ValueError for a model whose self-attention cannot be seen.
        """
        family = run.denoiser.family
        patterns = family.self_sites if kind == "attention" else family.blocks
        if not patterns:
            raise ValueError(
                f"{self.name} perturbs self-attention, and that of {family.name!r} makes no call "
                "of scaled_dot_product_attention"
            )
        return find_sites(run.denoiser.model, patterns, kind)

    def middle_sites(self, run: Run, wanted: str, kind: str) -> list[str]:
        """Sites of the comma-separated wildcards `wanted`; if empty those in the middle.

        That is the middle block of a UNet, or the middle one of a transformer's blocks. kind:
        "attention" or "block". Raises ValueError for a site that the method cannot perturb.
        """
        possible = self.possible_sites(run, kind)
        patterns = [part.strip() for part in wanted.split(",") if part.strip()]
        if not patterns:
            middle = [site for site in possible if site.startswith("mid_block.")]
            return middle or [possible[len(possible) // 2]]
        chosen = find_sites(run.denoiser.model, patterns, kind)
        if others := [site for site in chosen if site not in possible]:
            raise ValueError(
                f"{self.name}.sites: {', '.join(others)} cannot be perturbed by it; those that "
                f"can: {', '.join(possible)}"
            )
        return chosen
