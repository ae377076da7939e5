"""Guidance away from a worse version of the same model: its conditional branch, perturbed.

A subclass changes attention or blocks of one further branch. What it adds to the combined output is
scale * (conditional - perturbed), the form that PAG (Ahn et al. 2024, arXiv:2403.17377), SEG and
skip-layer guidance share, and that of autoguidance (Karras et al. 2024, arXiv:2406.02507) with
their weight w = 1 + scale.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from guidekit.attention.call import AttentionCall
from guidekit.backbones.records import Family
from guidekit.branches import Branch
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.run import Run
from guidekit.step import Step
from guidekit.taps import find_sites


@dataclass(kw_only=True)
class Perturbed(Guidance):
    """Pushes the output away from that of a perturbed conditional branch.

    The branch carries the guidance's name and stands in a group of its own, so that other plugins'
    scales and regions leave it alone. It costs one more row of the denoiser per image.
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
        return self._chosen(model, wanted, "attention", possible) or _middle(model, possible)

    def layer_sites(self, run: Run, wanted: tuple[str, ...]) -> list[str]:
        """Layers that the wildcards `wanted` name; the middle ones if empty.

        Raises GuidekitError for a site that is no layer.
        """
        model = run.denoiser.model
        possible = layers(model)
        return self._chosen(model, wanted, "block", possible) or _middle(model, possible)

    def _chosen(
        self, model: nn.Module, wanted: tuple[str, ...], kind: str, possible: list[str]
    ) -> list[str]:
        """Sites of the wildcards, which must be among the possible ones; none if there are none."""
        chosen = find_sites(model, list(wanted), kind)
        if others := [site for site in chosen if site not in possible]:
            raise GuidekitError(
                f"{self.name}.sites: {', '.join(others)} cannot be perturbed by it; those that "
                f"can: {', '.join(possible)}"
            )
        return chosen


def layers(model: nn.Module) -> list[str]:
    """The smallest blocks that hold attention: transformer blocks, a UNet2DModel's attentions."""
    blocks = find_sites(model, "*", "block")
    sites = find_sites(model, "*")
    holders = {site if site in blocks else site.rpartition(".")[0] for site in sites}
    return [block for block in blocks if block in holders]


def self_attention(model: nn.Module, family: Family) -> list[str]:
    """Attention sites with a softmax where pixels attend to pixels; joint attention is among them.

    Sana's linear attention has no map that could be perturbed.
    """
    if family.order == "text first":  # Lumina2 also refines the text by itself
        return find_sites(model, family.self_sites)
    sites = find_sites(model, "*")
    if family.order == "cross" and family.cross_sites:
        cross = find_sites(model, family.cross_sites)
        sites = [site for site in sites if site not in cross]
    kind = lambda site: type(model.get_submodule(site).processor).__name__  # noqa: E731
    return [site for site in sites if "Linear" not in kind(site)]


def pixel_rows(run: Run, call: AttentionCall) -> slice:
    """The queries of a self-attention call that are pixels; the others are text."""
    family = run.denoiser.family
    joint = family.order != "cross" and any(fnmatchcase(call.site, s) for s in family.cross_sites)
    return family.rows(call.query.shape[2], run.text_length) if joint else slice(None)


def _middle(model: nn.Module, possible: list[str]) -> list[str]:
    """The sites in a UNet's middle block, else those of the layer half-way through the model."""
    if inner := [site for site in possible if site.startswith("mid_block.")]:
        return inner
    holders = [block for block in layers(model) if any(_within(s, block) for s in possible)]
    return [site for site in possible if _within(site, holders[len(holders) // 2])]


def _within(site: str, block: str) -> bool:
    return site == block or site.startswith(f"{block}.")
