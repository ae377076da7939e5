"""What every guidance method is: a dataclass with the hooks that the engine calls at each step.

A guidance overrides what it needs. Gradient methods give `energy`, and `push` if the gradient is
not a score. Others change branches, attention, blocks, outputs or samples. Hooks of several
guidances chain in the order in which the user named them.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.conditions import Condition, Segment, box_mask

if TYPE_CHECKING:
    from guidekit.attention.call import AttentionCall
    from guidekit.run import Run
    from guidekit.step import Step
    from guidekit.taps import BlockCall


@dataclass(eq=False)
class Branch:
    """One row group of the denoiser's batch: the conditional one, the null, a region, a window.

    prompts: one text per picture, or one class or picture (`Denoiser.content`). weight: the default
    combination is base + sum of weight * (out - base) over the branches with a weight; the base is
    the branch whose weight is None. x: own carried input (B, C, h, w) in place of z. view: window
    (top, left, height, width) of the latents that this branch sees. group: branches combine with
    those of their own group; the combinations of other groups than "main" are for the guidance that
    made them to use.
    """

    name: str
    prompts: list[str | int]
    weight: float | None = None
    null: bool = False
    x: Tensor | None = None
    view: tuple[int, int, int, int] | None = None
    group: str = "main"

    def of(self, z: Tensor) -> Tensor:
        """What this branch sees of the carried z (B, C, h, w): its own input, its window."""
        x = z if self.x is None else self.x
        if self.view is None:
            return x
        top, left, height, width = self.view
        return x[..., top : top + height, left : left + width]


def combination(branches: list[Branch], outs: dict[str, Tensor]) -> Tensor:
    """Base plus the weighted differences to it: diffusers' formula for null and cond.

    Raises ValueError for branches of which none has the weight None.
    """
    base = next((outs[b.name] for b in branches if b.weight is None), None)
    if base is None:
        names = ", ".join(b.name for b in branches)
        raise ValueError(f"no base among the branches {names}: one needs the weight None")
    combined = base
    for branch in branches:
        if branch.weight is not None:
            combined = combined + branch.weight * (outs[branch.name] - base)
    return combined


@dataclass(eq=False, frozen=True)
class AttentionRead:
    """A wish for attention maps of the conditional branch.

    weights (B, T, S): a map per column, one-hot tokens or sums over a segment's tokens. sites: the
    modules to read, with the grid (h, w) of each. per_head keeps the heads apart. tokens (B, T)
    bool: the keys that take part in the softmax, all if None. extra (E, D): text states of further
    keys that take part in the softmax of the map only; the model's output does not see them.
    """

    weights: Tensor
    sites: dict[str, tuple[int, int]]
    per_head: bool = False
    tokens: Tensor | None = None
    extra: Tensor | None = None

    @functools.cached_property
    def columns(self) -> frozenset[int]:
        """Tokens that have weight in some picture; looked up once, as that waits for the GPU."""
        return frozenset(self.weights.ne(0).any(0).any(-1).nonzero().flatten().tolist())


@dataclass(eq=False, frozen=True)
class FeatureRead:
    """A wish for features of the conditional branch at the blocks that the wildcards name."""

    sites: tuple[str, ...]


@dataclass(eq=False)
class Eval:
    """What one denoiser call gave for one branch: its output and what was read on the way."""

    branch: Branch
    out: Tensor
    _read: dict = field(default_factory=dict, repr=False)
    variance: Tensor | None = None  # further channels of the output: a learned variance

    def attention(self, read: AttentionRead) -> dict[str, Tensor]:
        """Maps per site: (B, S, h, w), or (B, heads, S, h, w) where the read is per head."""
        return {site: self._read[id(read), site] for site in read.sites}

    def features(self, read: FeatureRead) -> dict[str, Tensor]:
        """Features per site (B, C, h, w)."""
        return {site: self._read[id(read), site] for site in read.sites}


@dataclass(kw_only=True)
class Guidance:
    """Base of all guidances.

    scale: strength, 0 switches it off. start, stop: active window as a fraction of the steps from
    the noisy end, start included, stop excluded.
    """

    scale: float = 1.0  # strength; 0 switches it off
    start: float = 0.0  # fraction of the steps, from the noisy end, at which it begins
    stop: float = 1.0  # fraction of the steps at which it ends

    # What the energy reads: "attention" or "features" of the conditional branch, "x0" of the
    # combined prediction, "input" only z itself (no graph of the backbone is built).
    graph: ClassVar[str] = "x0"
    # Whether the method needs the own loop: repeats, accept or its own start.
    own_loop: ClassVar[bool] = False
    # What it needs of a model: "text", tokens that pixels attend to; "cross-attention",
    # modules where they attend to those alone. Others are refused.
    needs: ClassVar[tuple[str, ...]] = ()
    # Whether it reads `Condition.image`; a picture that nothing reads is refused.
    reads_image: ClassVar[bool] = False
    # Checks of `guidekit.testing` that do not hold by design, each with the reason.
    waived: ClassVar[dict[str, str]] = {}

    def __post_init__(self):
        for name in ("scale", "start", "stop"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not abs(value) < float("inf"):
                raise ValueError(f"{self.name}.{name} must be a finite number, not {value}")
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(
                f"{self.name}: start and stop are fractions of the steps with "
                f"0 <= start <= stop <= 1, not {self.start} and {self.stop}"
            )

    @property
    def name(self) -> str:
        """The plugin's name in messages and in run.json; the registry sets it."""
        return getattr(self, "_name", type(self).__name__.lower())

    def active(self, frac: float) -> bool:
        """Whether it acts at the step that begins after the fraction `frac` of all steps."""
        return self.scale != 0 and self.start <= frac < self.stop

    @property
    def has_energy(self) -> bool:
        """Whether it is a gradient method."""
        return type(self).energy is not Guidance.energy

    @property
    def edits_attention(self) -> bool:
        """Whether it changes attention calls."""
        return type(self).edit_attention is not Guidance.edit_attention

    @property
    def edits_blocks(self) -> bool:
        """Whether it changes block calls."""
        return type(self).edit_block is not Guidance.edit_block

    @classmethod
    def example(cls) -> "Guidance":
        """A smallest valid instance that acts in three steps, for the conformance suite."""
        return cls()

    @classmethod
    def example_condition(cls) -> Condition:
        """A condition that the example can act on, for the conformance suite."""
        segment = Segment("red circle", box_mask((0, 0, 0.5, 1)))
        return Condition("a red circle on white", segments=(segment,))

    def prepare(self, run: "Run") -> None:
        """Called once before the first step: resolve tokens, masks, sites; ask for reads.

        Raise ValueError here if it cannot act. `run.read(...)` asks for maps or features,
        `run.tap_attention(self, sites)` and `run.tap_blocks(self, sites)` for calls to edit.
        """

    def branches(self, step: "Step", branches: list[Branch]) -> list[Branch]:
        """Adds, drops or changes branches of this step."""
        return branches

    def touches(self, branch: Branch) -> bool:
        """Whether `edit_attention` and `edit_block` are called for a branch."""
        return branch.name == "cond"

    def edit_input(self, step: "Step", branch: Branch, x: Tensor) -> Tensor:
        """Changes the scaled model input x (B, C, h, w) of a branch."""
        return x

    def edit_attention(self, step: "Step", branch: Branch, call: "AttentionCall") -> None:
        """Changes an attention call of a branch that it touches."""

    def edit_block(self, step: "Step", branch: Branch, call: "BlockCall") -> object | None:
        """Changes a block call of a branch that it touches; returns its output or None."""

    def combine(self, step: "Step", outs: dict[str, Tensor], combined: Tensor) -> Tensor:
        """Replaces or changes the combination of the branches' outputs (B, C, h, w).

        `combined` is that of the group "main", None if it has no branch; `step.groups` holds, and
        may be given, those of the other groups.
        """
        return combined

    def energy(self, step: "Step") -> Tensor:
        """Energy of every picture (B,) in float32, differentiable, lower is better."""
        raise NotImplementedError(f"{self.name} has no energy")

    def weight(self, frac: float) -> float:
        """Factor on `scale` over the course of sampling; 1 unless overridden."""
        return 1.0

    @property
    def rule(self) -> tuple:
        """Energies whose rules are equal are summed before one backward; `push` is the first's.

        Under the default rule the scale is a factor of the energy. A guidance that overrides `push`
        names everything that its push reads.
        """
        if type(self).push is Guidance.push:
            return ("score",)
        return (type(self), *dataclasses.astuple(self))

    def push(self, step: "Step", grad: Tensor) -> Tensor:
        """Change of the model's output from the gradient of the energies with respect to z.

        grad (B, C, h, w) in float32. The default takes minus the gradient, the scales being folded
        into the energies, for the score of the condition: eps' = eps + s * grad.
        """
        return step.move.score(-grad)

    def edit_prediction(self, step: "Step", out: Tensor) -> Tensor:
        """Changes the combined, pushed output just before the scheduler's step."""
        return out

    def edit_sample(self, step: "Step", z: Tensor) -> Tensor:
        """Changes the next z (B, C, h, w) after the scheduler's step."""
        return z

    def repeats(self, step: "Step") -> int:
        """How often this step is done, the sample being noised again in between (recurrence)."""
        return 1

    def accept(self, images: Tensor) -> Tensor:
        """Which finished pictures (B, 3, H, W) in [0, 1] are kept: (B,) bool."""
        return torch.ones(len(images), dtype=torch.bool)


def average_maps(
    maps: dict[str, Tensor],
    size: tuple[int, int] | None = None,
    pick: Callable[[list[Tensor]], Tensor] | None = None,
) -> Tensor:
    """Mean of maps (B, S, h, w) over sites at the largest grid among them, or at `size`.

    Bilinear enlargement as in ZestGuide (Couairon et al. 2023, section 3.2).
    """
    size = size or max((m.shape[-2:] for m in maps.values()), key=lambda s: s[0] * s[1])
    resized = [
        m if m.shape[-2:] == size else F.interpolate(m, size, mode="bilinear")
        for m in maps.values()
    ]
    return pick(resized) if pick else torch.stack(resized).mean(0)
