"""Regional prompts: pixels read the text of their own region, in one call, by masks on attention.

Chen, Xu, Zheng et al.: Training-free Regional Prompting for Diffusion Transformers, 2024,
arXiv:2411.02395: the texts of all regions stand one after the other; in joint attention (SD3, Flux)
a text sees itself and the pixels of its region, and pixels see their region's text and the pixels
of their region; the output is blended with that for the whole prompt. Here the pixels of no region
read the whole prompt, so that no row is without a key. In the cross-attention of UNets (Stable
Diffusion, SDXL) pixels read their region's text alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from guidekit import AttentionCall, Branch, Condition, Guidance, GuidekitError, Run, Step, hookimpl
from guidekit.toolbox import require_segments, segment_masks, segment_strengths

FAMILIES = ("sd", "sdxl", "sd3", "flux")


@dataclass(kw_only=True)
class Regions(Guidance):
    """Every region is drawn under its own prompt, and the rest under the whole one.

    A region's prompt is its segment's `prompt`, else `template` with the phrase. Masks are cut at
    0.5. It costs one more denoiser call a step, with the text of all regions.
    """

    plugin = "regions"

    scale: float = 1.0  # factor on the difference that the regions make; 0 switches it off
    stop: float = 0.4  # fraction of the steps at which it ends
    base: float = 0.3  # share of the output for the whole prompt, from 0 to 1
    template: str = "{}"  # prompt of a region whose segment has none; {} is the phrase
    apart: bool = True  # whether pixels of different regions are hidden from each other
    every: int = 1  # masks every n-th of the sites
    sites: tuple[str, ...] = ("cross-attention",)  # wildcards of modules where pixels read text

    needs = ("text",)
    own_loop = True

    def __post_init__(self):
        super().__post_init__()
        if "{}" not in self.template:
            raise GuidekitError(f"{self.name}.template needs {{}}, not {self.template!r}")
        if not 0 <= self.base <= 1 or self.every < 1:
            raise GuidekitError(f"{self.name}: base lies from 0 to 1, and every is at least 1")

    def prepare(self, run: Run) -> None:
        """Encodes the texts of all regions, and says at each grid who may see whom."""
        family = run.denoiser.family
        if family.name not in FAMILIES:
            raise GuidekitError(
                f"{self.name} puts texts one after the other, which goes with {', '.join(FAMILIES)}"
                f" and not with {family.name}, whose texts have masks; use multidiffusion"
            )
        require_segments(run.conditions, self.name)
        prompts = [self._prompts(c) for c in run.conditions]
        most = max(map(len, prompts))
        columns = [[row[s] if s < len(row) else "" for row in prompts] for s in range(most)]
        for column in columns:
            run.denoiser.check([Condition(prompt) for prompt in column])
        texts = [run.text(column) for column in columns]
        states = torch.cat([text.states for text in texts], 1)
        self._text = type(texts[0])(texts[0].given | {"encoder_hidden_states": states})
        grids = run.sites(list(self.sites))
        self._grids = {s: grids[s] for s in list(grids)[:: self.every]}
        run.tap_attention(self, list(self._grids))
        tokens = texts[0].states.shape[1]
        self._seen = {
            grid: self._seeing(_areas(run.conditions, grid), tokens, family.order).to(run.device)
            for grid in {*self._grids.values()}
        }

    def _prompts(self, condition: Condition) -> list[str]:
        """The whole prompt, then that of each region."""
        own = [
            self.template.format(s.phrase) if s.prompt is None else s.prompt
            for s in condition.segments
        ]
        return [condition.prompt, *own]

    def _seeing(self, areas: Tensor, tokens: int, order: str) -> Tensor:
        """Which query may see which key (B, 1, N, T), from the areas (B, R, h * w) of R texts."""
        text = areas.repeat_interleave(tokens, 1).mT  # (B, h * w, R * tokens)
        if order == "cross":
            return text[:, None]
        pixels = (areas.mT.float() @ areas.float()) > 0
        if not self.apart:
            pixels = torch.ones_like(pixels)
        own = torch.eye(areas.shape[1], dtype=torch.bool, device=areas.device)
        own = (
            own.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).expand(len(areas), -1, -1)
        )
        rows = [torch.cat([pixels, text], 2), torch.cat([text.mT, own], 2)]
        if order == "text first":
            rows = [torch.cat([own, text.mT], 2), torch.cat([text, pixels], 2)]
        return torch.cat(rows, 1)[:, None]

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Adds the branch of the regions; GuidekitError where no conditional one is left."""
        cond = next((b for b in branches if b.name == "cond"), None)
        if cond is None:
            names = ", ".join(b.name for b in branches)
            raise GuidekitError(
                f"{self.name} goes with the branch 'cond', which another plugin has replaced by "
                f"{names}; use them in two windows of steps, or one alone"
            )
        self._weight = 1.0 if cond.weight is None else cond.weight
        own = Branch(self.name, cond.prompts, x=cond.x, group=self.name, text=self._text)
        return [*branches, own]

    def touches(self, branch: Branch) -> bool:
        """Its own branch and no other."""
        return branch.name == self.name

    def edit_attention(self, step: Step, branch: Branch, call: AttentionCall) -> None:
        """Hides from each row what is of another region."""
        if call.index > 0:  # an IP-Adapter's image tokens
            return
        seen = self._seen[self._grids[call.site]]
        if call.mask is None:
            call.mask = seen
        else:
            call.bias(torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf))

    def combine(self, step: Step, outs: dict[str, Tensor], combined: Tensor) -> Tensor:
        """The combination with the regions' output blended into the conditional one."""
        amount = self.scale * self.schedule(step.frac) * (1 - self.base) * self._weight
        made = outs[self.name] - outs["cond"]
        return combined + amount * (_strengths(step.run.conditions, made) * made)

    @classmethod
    def example(cls) -> "Regions":
        """Regions in every step of a short run."""
        return cls(stop=1.0)


def _areas(conditions: list[Condition], grid: tuple[int, int]) -> Tensor:
    """Where each text counts (B, 1 + S, h * w), bool: the whole prompt's is what no region has."""
    masks = segment_masks(conditions, *grid)
    highest = masks.amax((2, 3), keepdim=True)  # a region smaller than a pixel keeps one
    inside = ((masks >= 0.5 * highest.clamp(max=1)) & (masks > 0)).flatten(2)
    return torch.cat([~inside.any(1, keepdim=True), inside], 1)


def _strengths(conditions: list[Condition], like: Tensor) -> Tensor:
    """Factors (B, 1, h, w) on what the regions make: the mean strength of a pixel's, 1 in none."""
    masks = segment_masks(conditions, *like.shape[-2:])
    covered = masks.sum(1, keepdim=True)
    more = (segment_strengths(conditions) - 1)[:, :, None, None]
    return (1 + (more * masks).sum(1, keepdim=True) / covered.clamp(min=1)).to(like)


@hookimpl
def register_guidance(register):
    """Offers `regions`."""
    register("regions", Regions)
