"""What every guidance method is: a dataclass with the hooks that the engine calls at each step.

A guidance overrides what it needs. Gradient methods give `energy`, and `push` if the gradient is
not a score. Others change branches, attention, blocks, outputs or samples. Hooks of several
guidances chain in the order in which the user named them.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from guidekit.attention.call import AttentionCall
from guidekit.blocks import BlockCall
from guidekit.branches import Branch
from guidekit.conditions import Condition, Segment
from guidekit.errors import GuidekitError
from guidekit.masks import box_mask
from guidekit.noise import Level
from guidekit.options import convert, option_kinds
from guidekit.run import Run
from guidekit.step import Step

Graph = Literal["x0", "attention", "features", "input"]
Need = Literal["text", "cross-attention"]
When = Literal["calls", "steps"]


@dataclass(kw_only=True)
class Guidance:
    """Base of all guidances: options as dataclass fields, methods of the engine as hooks.

    Every field has a default and a type that `guidekit.options` reads; values are checked here
    once, the same from Python, TOML and the command line. Raises GuidekitError for a wrong one.
    """

    #: Names of the options that were given when it was made; the others are defaults.
    given: ClassVar[frozenset[str]] = frozenset()

    scale: float = 1.0  # strength; 0 switches it off
    start: float = 0.0  # fraction of the steps, from the noisy end, at which it begins
    stop: float = 1.0  # fraction of the steps at which it ends
    sigma_start: float | None = None  # noise level s / a, of x0, at which it begins, or none
    sigma_stop: float | None = None  # noise level, lower than that, at which it ends, or none

    #: What the energy reads: "attention" or "features" of the conditional branch, "x0" of the
    #: combined prediction, "input" only z itself (no graph of the backbone is built).
    graph: ClassVar[Graph] = "x0"
    #: The plugin's name, for objects that are made of the class; default the class's in small.
    plugin: ClassVar[str] = ""
    #: With a solver of several calls a step: whether it acts at all "calls", or once in its
    #: "steps", at the last call of each, where `step.move.shift` lasts.
    acts_at: ClassVar[When] = "calls"
    #: Whether the method needs the own loop: repeats, accept or its own start.
    own_loop: ClassVar[bool] = False
    #: What it needs of a model: "text", tokens that pixels attend to; "cross-attention",
    #: modules where they attend to those alone. Others are refused.
    needs: ClassVar[tuple[Need, ...]] = ()
    #: Whether it reads `Condition.image`; an image that nothing reads is refused.
    reads_image: ClassVar[bool] = False
    #: Whether images of one group see each other in it; `resample` alone does not need it.
    grouped: ClassVar[bool] = False
    #: Field values that `preset` stands for, by its name; what the user gave wins over them.
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    #: Words of `guidekit sample --plugin NAME` that show it at work, where `example()`, which is
    #: for tests on any model, shows nothing to a user: it has a network that nobody trained.
    usage: ClassVar[str] = ""
    #: Checks of `guidekit.testing` that do not hold by design, each with the reason.
    waived: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        _refuse_misspelt(cls)

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Notes which options were given, so that a preset overrides none of them."""
        made = super().__new__(cls)
        vars(made)["given"] = frozenset(given)
        return made

    def __post_init__(self) -> None:
        self._apply_preset()
        for name, kind in option_kinds(type(self)).items():
            setattr(self, name, convert(getattr(self, name), kind, f"{self.name}.{name}"))
        for name in ("scale", "start", "stop"):
            if not abs(value := getattr(self, name)) < float("inf"):
                raise GuidekitError(f"{self.name}.{name} must be a finite number, not {value}")
        if not 0 <= self.start <= self.stop <= 1:
            raise GuidekitError(
                f"{self.name}: start and stop are fractions of the steps with "
                f"0 <= start <= stop <= 1, not {self.start} and {self.stop}"
            )
        high, low = self._sigmas()
        if not 0 <= low < high:
            raise GuidekitError(
                f"{self.name}: sigma_start and sigma_stop are noise levels, the first above the "
                f"second, such as 5.42 and 0.28, not {self.sigma_start} and {self.sigma_stop}"
            )

    @property
    def window(self) -> str:
        """Its window in words: `0 to 0.5`, and sigmas where they bound it."""
        high, low = self._sigmas()
        sigmas = f", sigma {high:g} to {low:g}" if (high, low) != (math.inf, 0.0) else ""
        return f"{self.start:g} to {self.stop:g}{sigmas}"

    def _sigmas(self) -> tuple[float, float]:
        """The noise levels of its window, those that were not given being no bound."""
        start, stop = self.sigma_start, self.sigma_stop
        return math.inf if start is None else start, 0.0 if stop is None else stop

    def _apply_preset(self) -> None:
        """The preset's values for the fields that the user did not give."""
        preset = getattr(self, "preset", "")
        if preset and preset not in self.presets:
            there = ", ".join(self.presets)
            raise GuidekitError(f"{self.name} has no preset {preset!r}; it has {there}")
        for name, value in self.presets.get(preset, {}).items():
            if name not in self.given:
                setattr(self, name, value)

    def check_contract(self) -> None:
        """Raises GuidekitError for a `graph` or a need that there is not: a misspelt one."""
        if self.acts_at not in get_args(When):
            raise GuidekitError(f"{self.name}.acts_at is {self.acts_at!r}; it is calls or steps")
        if self.graph not in get_args(Graph):
            raise GuidekitError(
                f"{self.name}.graph is {self.graph!r}; it is one of {', '.join(get_args(Graph))}"
            )
        for need in self.needs:
            if need not in get_args(Need):
                raise GuidekitError(
                    f"{self.name}.needs names {need!r}; there are {', '.join(get_args(Need))}"
                )

    @property
    def name(self) -> str:
        """The plugin's name in messages and in run.json; the registry sets it."""
        return getattr(self, "_name", "") or self.plugin or type(self).__name__.lower()

    @property
    def rejects(self) -> bool:
        """Whether it may reject finished images."""
        return type(self).accept is not Guidance.accept

    def active(self, frac: float, level: Level) -> bool:
        """Whether it acts at the step that begins after the fraction `frac` of all, at `level`."""
        return self.scale != 0 and self.inside(frac, level)

    def inside(self, frac: float, level: Level) -> bool:
        """Whether a step lies in the window: its fraction of the steps, and its noise level.

        The levels are those above sigma_stop, up to sigma_start (Kynkaanniemi et al. 2024, eq. 6).
        """
        high, low = self._sigmas()
        return self.start <= frac < self.stop and (level.sigma <= high and low < level.sigma)

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Whether the class has a hook of its own."""
        return getattr(cls, hook) is not getattr(Guidance, hook)

    @property
    def has_energy(self) -> bool:
        """Whether it is a gradient method."""
        return self.overrides("energy")

    @property
    def edits_attention(self) -> bool:
        """Whether it changes attention calls."""
        return self.overrides("edit_attention")

    @property
    def edits_blocks(self) -> bool:
        """Whether it changes block calls."""
        return self.overrides("edit_block")

    @classmethod
    def example(cls) -> "Guidance":
        """A smallest valid instance that acts in three steps, for the conformance suite."""
        return cls()

    @classmethod
    def example_condition(cls) -> Condition:
        """A condition that the example can act on, for the conformance suite."""
        segment = Segment("red circle", box_mask((0, 0, 0.5, 1)))
        return Condition("a red circle on white", segments=(segment,))

    def prepare(self, run: Run) -> None:
        """Called once before the first step: resolve tokens, masks, sites; ask for reads.

        Raise GuidekitError here if it cannot act. `run.read(...)` asks for maps or features,
        `run.tap_attention(self, sites)` and `run.tap_blocks(self, sites)` for calls to edit.
        """

    def begin(self, run: Run) -> Tensor | None:
        """The first z (B, C, h, w), at the level `run.levels.at(0)`; None for `run.first`.

        `run.rollout(z)` is what the run makes of a z without guidances, with gradient.
        One guidance of a run has it at most; it needs guidekit's own loop.
        """
        return None

    def solve(
        self, run: Run, z: Tensor, predict: Callable[[Tensor, int], Step]
    ) -> Iterator[tuple[Step, Tensor]]:
        """Draws in place of the scheduler's loop, for methods without a carried trajectory.

        Yields a step and what z (B, C, h, w) is after it; the last z are the finished latents.
        `predict(z, k)` is the guided step of call k at its level `run.levels.at(k)`, in any order
        and as often as it takes; what the model says is its `prediction`. One guidance of a run has
        it at most, and it needs guidekit's own loop. z: the first one.
        """
        raise NotImplementedError(f"{self.name} leaves the loop to the scheduler")

    def acts_on(self, step: Step) -> Tensor | None:
        """Which images (B,) bool it acts on at this step; None for all.

        Asked once a step. The engine leaves the other images as they were without the guidance:
        what hooks return is taken row by row. Branches that it adds are of its images, and are of
        a group of their own. At an attention site it edits last, and one such guidance at most. Not
        with `begin`, `solve`, `repeats` and `jumps`, which are of all.
        """
        return None

    def refine(self, step: Step, z: Tensor) -> Tensor:
        """Another z (B, C, h, w) at the step's own level, before its branches are evaluated.

        z is in float32 or better, gradients are on, and `step.denoise(step.model_input(z), ...)`
        evaluates it, with reads of main=False; `guidekit.toolbox.descend` is the usual loop. Asked
        at the first call of a step of the solver; refused with schedulers that would lose it.
        """
        return z

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Adds, drops or changes branches of this step."""
        return branches

    def touches(self, branch: Branch) -> bool:
        """Whether `edit_attention` and `edit_block` are called for a branch."""
        return branch.name == "cond"

    def edit_input(self, step: Step, branch: Branch, x: Tensor) -> Tensor:
        """Changes the scaled model input x (B, C, h, w) of a branch."""
        return x

    def edit_attention(self, step: Step, branch: Branch, call: AttentionCall) -> Tensor | None:
        """Changes an attention call of a branch that it touches, or returns its output.

        The call is of the branch's own rows. (B, H, N, d)
        """

    def edit_block(self, step: Step, branch: Branch, call: BlockCall) -> object | None:
        """Changes a block call of a branch that it touches; returns its output or None."""

    def combine(self, step: Step, outs: dict[str, Tensor], combined: Tensor) -> Tensor:
        """Replaces or changes the combination of the branches' outputs (B, C, h, w).

        `combined` is that of the group "main", None if it has no branch; `step.groups` holds, and
        may be given, those of the other groups.
        """
        return combined

    def energy(self, step: Step) -> Tensor:
        """Energy of every image (B,) in float32, differentiable, lower is better."""
        raise NotImplementedError(f"{self.name} has no energy")

    def schedule(self, frac: float) -> float:
        """Factor on `scale` after the fraction `frac` of the steps; 1 unless overridden."""
        return 1.0

    @property
    def rule(self) -> tuple[Any, ...]:
        """Energies whose rules are equal are summed before one backward; `push` is the first's.

        Under the default rule the scale is a factor of the energy. A guidance that overrides `push`
        names everything that its push reads.
        """
        if not self.overrides("push"):
            return ("score",)
        return (type(self), *dataclasses.astuple(self))

    def push(self, step: Step, grad: Tensor) -> Tensor:
        """Change of the model's output from the gradient of the energies with respect to z.

        grad (B, C, h, w) in float32. The default takes minus the gradient, the scales being folded
        into the energies, for the score of the condition: eps' = eps + s * grad.
        """
        return step.move.score(-grad)

    def edit_prediction(self, step: Step, out: Tensor) -> Tensor:
        """Changes the combined, pushed output just before the scheduler's step."""
        return out

    def resample(self, step: Step, z: Tensor) -> Tensor | None:
        """Which image's z each image goes on from: numbers (B,), each of the image's own group.

        z (B, C, h, w) is the next one, after `scheduler.step`; the scheduler's history goes with
        it, and what other guidances keep of an image does not. None where all stay as they are.
        `run.account.reward` keeps what it was decided by.
        """
        return None

    def edit_sample(self, step: Step, z: Tensor) -> Tensor:
        """Changes the next z (B, C, h, w) after the scheduler's step."""
        return z

    def repeats(self, step: Step) -> int:
        """How often this step is done, the sample being noised again in between (recurrence).

        With several calls a step of the solver it is asked at the first and covers all of them.
        """
        return 1

    def jumps(self, step: Step) -> int:
        """How many steps of the solver are done again after this one, which is the last of them.

        The sample is noised back over all of them at once (RePaint, time travel). 0 goes on; asked
        at the last call of each step, whose `step.repeat` says how often it was done before.
        """
        return 0

    def accept(self, images: Tensor) -> Tensor:
        """Which finished images (B, 3, H, W) in [0, 1] are kept: (B,) bool."""
        return torch.ones(len(images), dtype=torch.bool)


#: Methods that the engine and the suite call, which a guidance may override.
HOOKS = tuple(
    name
    for name, value in vars(Guidance).items()
    if inspect.isfunction(inspect.unwrap(getattr(value, "__func__", value)))
    and not name.startswith("_")
    and name not in ("check_contract", "inside", "overrides")
)


def _refuse_misspelt(cls: type) -> None:
    """Raises GuidekitError for a public method that is one edit away from a hook's name."""
    for name, value in vars(cls).items():
        method = callable(getattr(value, "__func__", value))
        if name in HOOKS and not method:
            raise GuidekitError(f"{cls.__name__}.{name} is the name of a hook; rename it")
        if name.startswith("_") or name in HOOKS or not method:
            continue
        for hook in HOOKS:
            if _one_edit(name, hook):
                raise GuidekitError(
                    f"{cls.__name__}.{name} would never be called: the hook is {hook!r}; rename "
                    "the method, or begin its name with an underscore"
                )


def _one_edit(a: str, b: str) -> bool:
    """Whether one letter more, less, other or two letters swapped make `a` of `b`."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if start is None:
        return len(a) != len(b)
    x, y = a[start:], b[start:]
    return x[1:] == y[1:] or x[1:] == y or x == y[1:] or (x[:2] == y[1::-1] and x[2:] == y[2:])
