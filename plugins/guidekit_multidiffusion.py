"""MultiDiffusion: a prompt for each region, and windows for images larger than the model's own.

Bar-Tal, Yariv, Lipman, Dekel: MultiDiffusion: Fusing diffusion paths for controlled image
generation, ICML 2023, arXiv:2302.08113, with the released code's bootstrapping.

The paper steps every region by itself and averages the next samples over the regions at each pixel
(Eq. 5). Here the outputs are averaged, before one step. For masks of 0 and 1 and a step that works
pixel by pixel that is the same: where a mask is 1 the region's input is z itself, also while
bootstrapping, and the mean of affine functions of the outputs is the function of their mean. It
differs, for the better, where the step draws noise (the mean of several draws has too little) and
where the solver keeps a history (the code's regions would overwrite each other's).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit import Branch, Condition, Guidance, GuidekitError, Run, Segment, Step, hookimpl
from guidekit.toolbox import derived_seed, require_segments

BACKGROUNDS = 20  # one-coloured images to draw from, as in the released code

View = tuple[int, int, int, int]


@dataclass(kw_only=True)
class MultiDiffusion(Guidance):
    """Every region is denoised under its own prompt, the rest under the main prompt.

    A region's prompt is its segment's `prompt`, else `template` with the phrase, its negative one
    the segment's `negative`; masks are cut at 0.5. Where regions overlap their outputs are averaged
    by the segments' strengths. The classifier-free scale is that of the conditional branch. With
    `circular` the latents close; the autoencoder, which decodes them once, still sees an edge.
    """

    scale: float = 1.0  # 1 on, 0 off
    template: str = "{}"  # prompt of a region whose segment has none; {} is the phrase
    bootstrap: float = 0.4  # share of the steps, the first, with one-coloured surroundings
    window: int = 0  # side of the windows in latent pixels, the model's own size; 0: no windows
    stride: int = 8  # between windows, in latent pixels
    circular: bool = False  # windows go on from the right edge at the left one: a full turn

    def __post_init__(self):
        super().__post_init__()
        if self.scale not in (0, 1):
            raise GuidekitError(f"multidiffusion.scale is 1 (on) or 0 (off), not {self.scale}")
        if "{}" not in self.template:
            raise GuidekitError(f"multidiffusion.template needs {{}}, not {self.template!r}")
        if not 0 <= self.bootstrap <= 1:
            raise GuidekitError(f"multidiffusion.bootstrap lies in 0 to 1, not {self.bootstrap}")
        if self.window < 0 or self.stride < 1:
            raise GuidekitError("multidiffusion.window is at least 0 and stride at least 1")
        if self.circular and not self.window:
            raise GuidekitError("multidiffusion.circular needs multidiffusion.window")

    @property
    def needs(self) -> tuple[str, ...]:
        """Text, as regions have prompts; windows alone need none."""
        return () if self.window else ("text",)

    def prepare(self, run: Run) -> None:
        """Cuts the masks, encodes the surroundings for bootstrapping, lays out the windows."""
        if not self.window:
            require_segments(run.conditions, "multidiffusion")
        self._regions = self._texts(run.conditions)
        for _, prompts, negatives in self._regions:
            run.denoiser.check([Condition(*t) for t in zip(prompts, negatives, strict=True)])
        self._masks = region_masks(run.conditions, run.grid).to(run.device)
        self._views = windows(*run.grid, self.window, self.stride, self.circular)
        last = [view[1] + view[3] for view in self._views if view]
        self._beyond = max([*last, run.grid[1]]) - run.grid[1]  # columns past the right edge
        self._shares = self._wrapped(_shares(run.conditions, self._masks))
        self._noise: Tensor | None = None
        if self.bootstrap and len(self._regions) > 1:
            self._backgrounds = _backgrounds(run)

    def _texts(self, conditions: list[Condition]) -> list[tuple[str, list[str], list[str]]]:
        """Name, prompts and negative ones of the main prompt and of every region.

        An image with fewer regions than others has empty texts there, and no share of the output.
        """
        main = ("main", [c.content for c in conditions], [c.negative for c in conditions])
        most = max(len(c.segments) for c in conditions)
        regions = [
            (f"region{s}", *zip(*(self._pair(c, s) for c in conditions), strict=True))
            for s in range(most)
        ]
        return [main, *((name, list(p), list(n)) for name, p, n in regions)]

    def _pair(self, condition: Condition, index: int) -> tuple[str, str]:
        """Prompt and negative prompt of one region of one image."""
        if index >= len(condition.segments):
            return "", ""
        segment: Segment = condition.segments[index]
        own = segment.prompt
        return self.template.format(segment.phrase) if own is None else own, segment.negative

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Adds the regions; windows take the place of the main prompt's branches."""
        weight = _conditional(branches).weight
        inputs = self._inputs(step)
        added = list(branches)
        if self._views != [None]:
            added = []
            if others := [b.name for b in branches if b.name not in ("cond", "null")]:
                raise GuidekitError(f"multidiffusion.window cannot cut the branch {others[0]!r}")
        for region, view in self._parts():
            name = _group(self._regions[region][0], view)
            _, prompts, negatives = self._regions[region]
            x = step.z if inputs[region] is None and self._beyond else inputs[region]
            own = {"x": x if x is None else self._wrapped(x), "view": view, "group": name}
            if weight is not None:
                added.append(Branch(f"{name}.null", negatives, null=True, **own))
            added.append(Branch(name, prompts, weight, **own))
        return added

    def _wrapped(self, x: Tensor) -> Tensor:
        """x (..., h, w) with its first columns once more after its last, as far as windows go."""
        return torch.cat([x, x[..., : self._beyond]], -1) if self._beyond else x

    def _folded(self, x: Tensor) -> Tensor:
        """Columns past the right edge added to those that they are: (..., h, w)."""
        folded = x[..., : x.shape[-1] - self._beyond].clone()
        folded[..., : self._beyond] += x[..., x.shape[-1] - self._beyond :]
        return folded

    def _parts(self) -> list[tuple[int, View | None]]:
        """Regions and windows to denoise; the main prompt on the whole image is there already.

        A region outside of a window would have no share of the output.
        """
        parts = [(region, view) for view in self._views for region in range(len(self._regions))]
        return [
            (region, view)
            for region, view in parts
            if (region, view) != (0, None) and _cut(self._shares[:, region], view).any()
        ]

    def _inputs(self, step: Step) -> list[Tensor | None]:
        """Own input (B, C, h, w) of every region, None where it is z.

        While bootstrapping a region sees the noised encoding of an image of one colour around its
        mask, another one at every step (section 4.2, with the code's 20 of 50 steps). As in the
        code the noise is that which the run begins with, so that at first a region's input goes on
        across the edge of its mask.
        """
        count = len(self._regions)
        if step.frac >= self.bootstrap or count == 1:
            return [None] * count
        if self._noise is None or (step.index, step.repeat) == (0, 0):
            self._noise = step.z.detach().clone() / step.level.norm
        inputs: list[Tensor | None] = [None]
        for region in range(1, count):
            drawn = [
                derived_seed(seed, step.index, step.repeat, region, "multidiffusion") % BACKGROUNDS
                for seed in step.run.seeds
            ]
            noised = step.level.a * self._backgrounds[drawn] + step.level.s * self._noise
            mask = self._masks[:, region - 1, None]
            inputs.append(step.z * mask + (1 - mask) * noised.to(step.z.dtype))
        return inputs

    def combine(self, step: Step, outs: dict[str, Tensor], combined: Tensor | None) -> Tensor:
        """Mean of the regions' outputs at every pixel, by their shares; 0 where nobody has one."""
        wide = torch.promote_types(step.z.dtype, torch.float32)
        value = torch.zeros_like(self._wrapped(step.z.detach()), dtype=wide)
        count = torch.zeros_like(value[:, :1])
        parts = [(_group(self._regions[r][0], v), r, v) for r, v in self._parts()]
        fused = [(step.groups[name], region, view) for name, region, view in parts]
        if combined is not None:
            fused.append((combined, 0, None))
        for out, region, view in fused:
            share = _cut(self._shares[:, region, None], view)
            _cut(value, view).add_(share * out)
            _cut(count, view).add_(share)
        value, count = self._folded(value), self._folded(count)
        return (value / torch.where(count > 0, count, 1.0)).to(fused[0][0].dtype)


def _conditional(branches: list[Branch]) -> Branch:
    """The branch of the main prompt; raises GuidekitError if another plugin has replaced it."""
    for branch in branches:
        if branch.name == "cond":
            return branch
    raise GuidekitError(
        "multidiffusion needs the branch 'cond', which another plugin has replaced by "
        f"{', '.join(b.name for b in branches)}; use them in two windows of steps, or one alone"
    )


def _group(name: str, view: View | None) -> str:
    """Name of a region in a window."""
    return name if view is None else f"{name}@{view[0]},{view[1]}"


def _cut(x: Tensor, view: View | None) -> Tensor:
    """The window of x (..., h, w), a view into it."""
    if view is None:
        return x
    top, left, height, width = view
    return x[..., top : top + height, left : left + width]


def windows(
    height: int, width: int, window: int, stride: int, circular: bool = False
) -> list[View | None]:
    """Windows (top, left, height, width) that cover the grid; [None] if one window is enough.

    The released code leaves a margin uncovered where the strides do not add up to the size; here
    the last window lies at the edge. circular: windows begin at every stride of the width, also
    where they reach past the right edge.
    """
    if not window or window >= max(height, width):
        return [None]

    def starts(side: int) -> list[int]:
        last = max(side - window, 0)
        return sorted({*range(0, last + 1, stride), last})

    size = min(window, height), min(window, width)
    turn = circular and width > window
    lefts = list(range(0, width, stride)) if turn else starts(width)
    return [(top, left, *size) for top in starts(height) for left in lefts]


def region_masks(conditions: list[Condition], grid: tuple[int, int]) -> Tensor:
    """Masks (B, S, h, w) of 0 and 1, cut at 0.5 and resized to the nearest, as the code does it.

    Raises GuidekitError for a region that has no latent pixel.
    """
    most = max(len(c.segments) for c in conditions)
    masks = torch.zeros(len(conditions), most, *grid)
    for b, condition in enumerate(conditions):
        for s, segment in enumerate(condition.segments):
            masks[b, s] = F.interpolate((segment.mask >= 0.5)[None, None].float(), grid)[0, 0]
            if not masks[b, s].any():
                raise GuidekitError(
                    f"multidiffusion: the mask of {segment.phrase!r} has no pixel of at least 0.5 "
                    f"on the {grid[0]}x{grid[1]} latents; make it larger"
                )
    return masks


def _shares(conditions: list[Condition], masks: Tensor) -> Tensor:
    """Shares (B, 1 + S, h, w) in the mean of the main prompt and of each region."""
    shares = masks.clone()
    for b, condition in enumerate(conditions):
        for s, segment in enumerate(condition.segments):
            if segment.strength <= 0:
                raise GuidekitError(
                    f"multidiffusion: the strength of {segment.phrase!r} is a share and must be "
                    f"positive, not {segment.strength:g}"
                )
            shares[b, s] *= segment.strength
    return torch.cat([(1 - masks.sum(1, keepdim=True)).clamp(min=0), shares], 1)


def _backgrounds(run: Run) -> Tensor:
    """Clean latents (20, C, h, w) of images of one colour, the same in every run."""
    colours = torch.rand(BACKGROUNDS, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = [
            run.denoiser.latents(c.to(run.device)[None, :, None, None].expand(1, 3, *run.size))
            for c in colours
        ]
    return torch.cat(latents)


@hookimpl
def register_guidance(register):
    """Offers `multidiffusion`."""
    register("multidiffusion", MultiDiffusion)
