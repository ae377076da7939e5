"""ZestGuide: objects stand where their masks say, by a gradient on cross-attention maps.

Couairon, Careil, Cord, Lathuiliere, Verbeek: Zero-shot spatial layout conditioning for
text-to-image diffusion models, ICCV 2023, arXiv:2306.13754. The defaults follow the paper; the
fields name what the released code (gcouairon/zestguide, for Stable Diffusion 1.4 and for SDXL) does
instead, and the presets put that together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit import AttentionRead, Guidance, GuidekitError, Run, Step, average_maps, hookimpl
from guidekit.toolbox import (
    real_tokens,
    require_segments,
    segment_masks,
    segment_strengths,
    segment_weights,
)

# `paper` is the method of its Table 1, which needs the plugin `pww` beside this one. The others are
# like the released configurations, and are not called by their names because something outside of
# this plugin belongs to them. SD 1.4: 182 class names as further keys (`negatives`), the guidance
# scale 7.5 and Stable Diffusion's PNDM scheduler, after whose step the sample is moved. SDXL: the
# guidance scale 7.5 and the Euler scheduler.
PRESETS = {
    "paper": {},
    "like-sd14": {
        "scale": 0.3,
        "without": ("middle", "fine-encoder"),
        "resize": "logits",
        "gain": 10.0,
        "gate": 0.01,
        "gate_normalised": 0.1,
        "decay": "noise",
        "eps": 1e-3,
    },
    "like-sdxl": {
        "scale": 0.1,
        "without": ("middle",),
        "resize": "logits",
        "grid": "smallest",
        "loss": "power4",
        "aggregate": "top",
        "tokens": "real",
        "normaliser": "max",
        "decay": "run",
    },
}


@dataclass(kw_only=True)
class Zest(Guidance):
    """Pulls the attention maps of each masked phrase towards its mask."""

    scale: float = 1.0  # largest move of a latent number per step, in units of VP latents (eta)
    stop: float = 0.5  # fraction of the steps after which the layout is settled (tau)
    sites: tuple[str, ...] = ()  # wildcards of attention modules; none is the family's choice
    # Parts of a UNet whose sites are not used; fine-encoder: on the way down, at the finest grid.
    without: tuple[Literal["middle", "fine-encoder"], ...] = ()
    resolutions: tuple[int, ...] = ()  # long sides of the maps to use, 32,16; none is all
    # What is brought to one grid: maps, or logits before the softmax, as in the released code.
    resize: Literal["maps", "logits"] = "maps"
    grid: Literal["largest", "smallest"] = "largest"  # that one of the sites' grids
    # Where the loss is taken; top: best maps only.
    aggregate: Literal["global", "layer", "head", "top"] = "global"
    top: int = 20  # number of maps that `aggregate = "top"` keeps per segment
    # Of maps and masks; bce has two terms, bce_plain the first, bce_normalised the second.
    loss: Literal["bce", "bce_plain", "bce_normalised", "power4", "mse"] = "bce"
    gain: float = 1.0  # factor on the maps in the first term of bce
    gate: float = 0.0  # the first term leaves pixels alone where map * gain and mask are below it
    gate_normalised: float = 0.0  # and the second where map / peak and mask are below this one
    dead_zone: float = 0.2  # difference of map and mask that power4 leaves alone
    # From 1 to 0 over the window; 1; sqrt(1 - abar); from 1 to 0 over all steps.
    decay: Literal["linear", "constant", "noise", "run"] = "linear"
    # Of the gradient, per image; max is signed.
    normaliser: Literal["linf", "l2", "l1", "max", "none"] = "linf"
    # Shortens a step whose gradient has become small: weight of its norm's largest value so far.
    damping: float = 0.0
    momentum: float = 0.0  # share of the steps before in the direction of this one, below 1
    tokens: Literal["all", "real"] = "all"  # keys in the softmax; real is without padding
    negatives: tuple[str, ...] = ()  # phrases that compete in the softmax of the maps; CLIP's alone
    eps: float = 1e-4  # keeps the logarithms finite
    preset: str = ""  # paper | like-sd14 | like-sdxl: values of the fields that are not given

    graph = "attention"
    acts_at = "steps"  # of the solver: a shift lasts at the last call of each
    needs = ("text",)
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.eps < 0.5 or self.top < 1:
            raise GuidekitError("zest.eps must lie between 0 and 0.5 and zest.top be at least 1")
        if not self.gain > 0:
            raise GuidekitError(f"zest.gain is a positive factor, not {self.gain}")
        if self.damping < 0 or not 0 <= self.momentum < 1:
            raise GuidekitError(
                "zest.damping must be at least 0 and zest.momentum from 0 to below 1, not "
                f"{self.damping:g} and {self.momentum:g}"
            )

    def prepare(self, run: Run) -> None:
        """Finds the tokens of the phrases and the sites, and asks for their maps."""
        require_segments(run.conditions, "zest")
        tokenizers, length = run.denoiser.tokenizers, run.text_length
        weights = segment_weights(tokenizers, run.conditions, length)
        self._strengths = segment_strengths(run.conditions).to(run.device)
        sites = self._sites(run)
        pick = max if self.grid == "largest" else min
        self._common = pick(sites.values(), key=math.prod)
        self._read: AttentionRead = run.attention_read(
            self,
            weights,
            sites,
            per_head=self.aggregate in ("head", "top"),
            tokens=real_tokens(tokenizers, run.conditions, length)
            if self.tokens == "real"
            else None,
            extra=self._negatives(run),
            resize=self._common if self.resize == "logits" else None,
        )
        self._masks = {
            grid: segment_masks(run.conditions, *grid).to(run.device)
            for grid in {self._common, *map(self._read.shape, self._read.sites)}
        }
        self._largest: Tensor | None = None  # (B, 1, 1, 1), norm of the gradient so far
        self._direction: Tensor | None = None  # (B, C, h, w), of the step before

    def _sites(self, run: Run) -> dict[str, tuple[int, int]]:
        """Sites by name and by resolution; raises GuidekitError if none is left."""
        sites = self._kept(run.sites(list(self.sites)))
        if not self.resolutions:
            return sites
        wanted = set(self.resolutions)
        chosen = {site: grid for site, grid in sites.items() if max(grid) in wanted}
        if {max(grid) for grid in chosen.values()} != wanted:
            exist = ", ".join(str(r) for r in sorted({max(g) for g in sites.values()}))
            given = ", ".join(map(str, self.resolutions))
            raise GuidekitError(f"zest.resolutions {given}: the sites have {exist}")
        return chosen

    def _kept(self, sites: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Sites outside of the parts that are to be left out."""
        finest = max(sites.values(), key=math.prod)
        left_out = {
            "middle": lambda site, grid: site.startswith("mid_block."),
            "fine-encoder": lambda site, grid: site.startswith("down_blocks.") and grid == finest,
        }
        kept = {
            site: grid
            for site, grid in sites.items()
            if not any(left_out[part](site, grid) for part in self.without)
        }
        if not kept:
            raise GuidekitError(
                f"zest.without {', '.join(self.without)}: no site is left of {', '.join(sites)}"
            )
        return kept

    def _negatives(self, run: Run) -> Tensor | None:
        """Mean text state of each negative phrase (E, D), as the released code has them."""
        if not self.negatives:
            return None
        if run.denoiser.family.name not in ("sd", "sdxl"):
            # Elsewhere text states go through more than `to_k` before they are keys.
            raise GuidekitError(
                "zest.negatives become keys as CLIP's states do in Stable Diffusion and SDXL; "
                f"{type(run.denoiser.pipeline).__name__} has others: leave them out"
            )
        tokenizer = run.denoiser.tokenizers[0]
        states = run.denoiser.text(list(self.negatives), run.size).states
        counts = [len(tokenizer(p)["input_ids"]) for p in self.negatives]
        means = [s[1 : n - 1].mean(0) for s, n in zip(states, counts, strict=True)]
        return torch.stack(means)

    def schedule(self, frac: float) -> float:
        """The paper's lambda(t): from 1 at the first guided step to 0 at the end of the window."""
        if self.decay == "linear":
            return 1 - (frac - self.start) / (self.stop - self.start)
        return 1 - frac if self.decay == "run" else 1.0

    def energy(self, step: Step) -> Tensor:
        """Cross-entropy of maps and masks, summed over segments (B,)."""
        maps = step.cond.attention(self._read)
        aggregated = self._aggregated(maps)
        step.run.account.keep("attention", self._shown(maps, aggregated))
        return self._total(aggregated)

    def _total(self, aggregated: list[tuple[Tensor, tuple[int, int]]]) -> Tensor:
        """The mean loss of maps with their grids, summed over segments (B,)."""
        losses = [self._loss(m, self._masks[grid]) for m, grid in aggregated]
        return (torch.stack(losses).mean(0) * self._strengths).sum(1)

    def _aggregated(self, maps: dict[str, Tensor]) -> list[tuple[Tensor, tuple[int, int]]]:
        """Maps (B, S, h, w) whose losses are averaged, each with its grid."""
        if self.aggregate == "global":
            return [(average_maps(maps, self._common), self._common)]
        if self.aggregate == "layer":
            return [(m, self._read.shape(site)) for site, m in maps.items()]
        if self.aggregate == "head":
            return [(h, self._read.shape(s)) for s, m in maps.items() for h in m.unbind(1)]
        heads = {(site, i): head for site, m in maps.items() for i, head in enumerate(m.unbind(1))}
        return [(average_maps(heads, self._common, self._best), self._common)]

    def _best(self, maps: list[Tensor]) -> Tensor:
        """Mean of each segment's `top` maps by the released SDXL code's score q99 (1 - q01)."""
        stack = torch.stack(maps, 2)  # (B, S, n, h, w)
        flat = stack.detach().flatten(3)
        high, low = flat.quantile(0.99, 3), flat.quantile(0.01, 3)
        best = (high * (1 - low)).topk(min(self.top, flat.shape[2]), 2).indices
        index = best[..., None, None].expand(*best.shape, *stack.shape[-2:])
        return stack.gather(2, index).mean(2)

    def _loss(self, maps: Tensor, masks: Tensor) -> Tensor:
        """Loss of every segment (B, S) for maps and masks (B, S, h, w)."""
        masks = masks.to(maps.dtype)
        peak = maps.amax((2, 3), keepdim=True).clamp(min=self.eps)
        if self.loss == "bce_plain":
            return self._cross_entropy(self.gain * maps, masks, self.gate)
        if self.loss == "bce_normalised":
            return self._cross_entropy(maps / peak, masks, self.gate_normalised)
        if self.loss == "bce":  # both terms: the maximum of the second one has no gradient
            plain = self._cross_entropy(self.gain * maps, masks, self.gate)
            return plain + self._cross_entropy(maps / peak, masks, self.gate_normalised)
        if self.loss == "mse":
            return F.mse_loss(maps / peak, masks, reduction="none").mean((2, 3))
        error = (maps - masks).abs()
        return torch.where(error > self.dead_zone, error**4, 0.0).mean((2, 3))

    def _cross_entropy(self, maps: Tensor, masks: Tensor, gate: float) -> Tensor:
        """Binary cross-entropy (B, S), mean over the pixels.

        gate: pixels where neither map nor mask is above it do not pull; 0 is none.
        """
        maps = torch.where((maps <= gate) & (masks <= gate), maps.detach(), maps) if gate else maps
        maps = maps.clamp(self.eps, 1 - self.eps)
        return F.binary_cross_entropy(maps, masks, reduction="none").mean((2, 3))

    def _shown(self, maps: dict[str, Tensor], aggregated: list) -> Tensor:
        """The average map (B, S, h, w) for the report."""
        if self.aggregate == "global":
            return aggregated[0][0]
        with torch.no_grad():
            flat = {s: m.mean(1) if self._read.per_head else m for s, m in maps.items()}
            return average_maps(flat, self._common)

    def push(self, step: Step, grad: Tensor) -> Tensor:
        """z' moves by scale * weight against the normalised gradient (Section 3.3).

        The paper's step is in units of VP latents; carried samples of VE schedulers are
        sqrt(1 + sigma^2) times larger, and so is the move.
        """
        return step.move.shift(-self._amount(step) * self._directed(grad))

    def _directed(self, grad: Tensor) -> Tensor:
        """The normalised gradient, averaged with the steps before where there is momentum."""
        direction = self._normalised(grad)
        if self.momentum and self._direction is not None:
            direction = torch.lerp(direction, self._direction, self.momentum)
        self._direction = direction
        return direction

    def _amount(self, step: Step) -> float:
        """Length of this step in units of the next z."""
        amount = self.scale * self.schedule(step.frac) * step.next_level.norm
        if self.decay == "noise":
            amount = amount * step.level.s / math.hypot(step.level.a, step.level.s)
        return amount

    def _normalised(self, grad: Tensor) -> Tensor:
        """The gradient over its norm, each image by itself.

        Damped it is g (1 + c) / (|g| + c m) with m the largest |g| so far: never longer than
        without, and proportional to the gradient where that is small.
        """
        norms: dict[str, Callable[[Tensor], Tensor]] = {
            "linf": lambda g: g.abs().amax(1),
            "l2": lambda g: g.norm(dim=1) / math.sqrt(g.shape[1]),
            "l1": lambda g: g.abs().mean(1),
            "max": lambda g: g.amax(1).abs(),
            "none": lambda g: torch.ones_like(g[:, 0]),
        }
        norm = norms[self.normaliser](grad.flatten(1))[:, None, None, None]
        if c := self.damping:
            known = norm if self._largest is None else self._largest
            self._largest = torch.maximum(norm, known)
            norm = (norm + c * self._largest) / (1 + c)
        return grad / norm.clamp(min=torch.finfo(grad.dtype).tiny)

    @classmethod
    def example(cls) -> "Zest":
        """Guides every step of a short run."""
        return cls(stop=1.0)


@hookimpl
def register_guidance(register):
    """Offers `zest`."""
    register("zest", Zest)
