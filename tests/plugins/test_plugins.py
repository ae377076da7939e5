"""Conformance: every first-party plugin and the template hold, deliberately broken ones do not."""

import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from guidekit import Branch, Condition, Guidance, Segment, box_mask, sample
from guidekit.cli.scaffold import template
from guidekit.errors import GuidekitError
from guidekit.registry import Registry, entries
from guidekit.testing import CHECKS, check_guidance, run_check, sd_pipeline
from guidekit.testing.built_ins import BuiltIn, rows
from guidekit.zoo.shipped import DEFAULT


def vignette() -> type[Guidance]:
    """The template's class, from where the template lies."""
    spec = importlib.util.spec_from_file_location("vignette", template() / "guidekit_vignette.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Vignette


def first_party() -> dict[str, type[Guidance]]:
    registry, found = Registry(), {}
    for name in [entry.name for entry in entries() if entry.first_party]:
        found |= registry.load(name).guidances
    return found


GUIDANCES = first_party()


# Stable Diffusion in the tier `fast`, the other families in `full`.
TIERED = [
    pytest.param(check, marks=[] if family == "sd" else pytest.mark.full)
    for check, (_, family) in CHECKS.items()
]


# Why a check does not apply.
NOT_ITS_KIND = ("it has no energy", "images of a group do not see each other in it")
# What a plugin that is refused needs, and the family has not.
REFUSED = {"dit": "text", "sd3": "cross-attention"}
# Models without text, and without classifier-free guidance at their own settings.
WORDLESS = {"adaptive", "apg", "attend-and-excite", "cfg", "multidiffusion", "pww", "zest"}
WORDLESS |= {"cfg-pp", "cfg-zero", "rectified-cfg-pp", "tcfg"}
WORDLESS |= {"boxdiff", "layout-guidance", "regions", "self-guidance"}
# `fk` and `stylealigned` do nothing in groups of one image; `fk` also with the models' own solvers,
# which add no noise.
ALONE = {"fk", "stylealigned"}
REFUSED_BY = {
    "scenes": ALONE,
    "scenes-ddpm": WORDLESS | ALONE | {"semantica"},
    "scenes-semantica": WORDLESS | ALONE | {"ilvr"},  # its scheduler keeps samples
}


# Of those on one base, `dps`, `mpgd`, `cfg-pp` and `pag` stand for the others in the tier `fast`;
# of the last lines each has tests of its own that hold it to its paper.
ALIKE = {"cfg-zero", "ddnm", "energy", "flowchef", "freedom", "lgd", "pigdm", "psld"}
ALIKE |= {"rectified-cfg-pp", "search", "tcfg", "tfg", "ugd"}
ALIKE |= {"boxdiff", "layout-guidance", "readout", "regions", "sag", "self-guidance"}
ALIKE |= {
    "clip",
    "fewshot",
    "stylealigned",
    "tpg",
    "adaptive",
    "autoguidance",
    "fk",
    "red-diff",
    "reno",
    "seg",
    "slg",
}
QUICK = ("constructs", "documented", "config", "scale_0", "acts")


def _tier(name, check, family):
    """Alike plugins on other families than Stable Diffusion: whether they act, and scale 0."""
    if family == "sd":
        return [] if name not in ALIKE or check in QUICK else pytest.mark.full
    slow = name in ALIKE and not check.startswith(("acts", "scale_0"))
    return pytest.mark.slow if slow else pytest.mark.full


def _first_party():
    for name in GUIDANCES:
        for check, (_, family) in CHECKS.items():
            yield pytest.param(name, check, marks=_tier(name, check, family))


@pytest.mark.parametrize("name, check", list(_first_party()))
def test_first_party(name, check):
    if reason := run_check(GUIDANCES[name], check):
        cls, (function, family) = GUIDANCES[name], CHECKS[check]
        refused = REFUSED.get(family) in cls.example().needs
        waived = {check, function.__name__} & cls.waived.keys()
        built_in = name in REFUSED_BY.get(family, ())
        assert reason in NOT_ITS_KIND or waived or refused or built_in


@pytest.mark.full
@pytest.mark.parametrize("check", TIERED)
def test_the_template(check):
    assert run_check(vignette(), check) in (None, NOT_ITS_KIND[1])


@dataclass(kw_only=True)
class Good(Guidance):
    """Pulls towards grey; correct, so that what its broken children change is what is caught.

    Written for this test in 2026.
    """

    scale: float = 0.1

    def energy(self, step):
        return (step.x0**2).flatten(1).mean(1)


class Mixed(Good):
    """Normalised by a norm of the whole batch (2026)."""

    def energy(self, step):
        return (step.x0**2).flatten(1).sum(1) / step.x0.detach().norm()


class OneCondition(Good):
    """Treats every image as the first one (2026)."""

    def prepare(self, run):
        self.half = run.conditions[0].segments[0].mask[::16, ::16]

    def energy(self, step):
        return (step.x0 * self.half).flatten(1).mean(1)


class Hook(Good):
    """Leaves a hook (2026)."""

    def prepare(self, run):
        run.denoiser.model.register_forward_hook(lambda *args: None)


class Wrapped(Good):
    """Wraps forward and takes it back at the last step only (2026)."""

    def edit_input(self, step, branch, x):
        model = step.run.denoiser.model
        if step.index == 0 and "forward" not in vars(model):
            original = model.forward
            model.forward = lambda *args, **kwargs: original(*args, **kwargs)
        if step.index == step.n - 1:
            vars(model).pop("forward", None)
        return x


class Weights(Good):
    """Edits weights in place (2026)."""

    def edit_input(self, step, branch, x):
        with torch.no_grad():
            step.run.denoiser.model.conv_in.bias.add_(1e-3)
        return x


class Shape(Good):
    """One number for the whole batch (2026)."""

    def energy(self, step):
        return super().energy(step).mean()


class Infinite(Good):
    """Not a number (2026)."""

    def energy(self, step):
        return super().energy(step) * float("nan")


class Gradient(Good):
    """Half of the dependence on z is cut off (2026)."""

    def energy(self, step):
        return (step.x0 * step.x0.detach()).flatten(1).mean(1)


class Idle(Guidance):
    """Counts an edit and makes none (2026)."""

    def branches(self, step: object, branches: list[Branch]) -> list[Branch]:
        step.run.account.edit(self.name)
        return branches


class Silent(Guidance):
    """Acts and tells nobody; the engine sees it (2026)."""

    def edit_prediction(self, step, out):
        return 1.1 * out


class Eager(Good):
    """Acts outside of its window (2026)."""

    def active(self, frac, level):
        return True


class Random(Good):
    """Draws noise from nowhere (2026)."""

    def energy(self, step):
        return (step.x0 * torch.randn(step.x0.shape)).flatten(1).mean(1)


class Memory(Good):
    """Carries something from run to run (2026)."""

    runs = 0

    def prepare(self, run):
        Memory.runs += 1

    def schedule(self, frac):
        return float(Memory.runs)


class Unsourced(Good):
    """Says nothing of where it comes from."""


@dataclass(kw_only=True)
class Narrow(Good):
    """Casts to float32, where finite differences in float64 would be called a wrong gradient."""

    def energy(self, step):
        return super().energy(step).float()


@dataclass(kw_only=True)
class Constant(Good):
    """Makes a constant in float32, which a product does not take with float64."""

    def prepare(self, run):
        self._weights = torch.ones(run.latent_shape[0], 1)

    def energy(self, step):
        return (step.x0.movedim(1, -1) @ self._weights).square().flatten(1).mean(1)


@dataclass(kw_only=True)
class Factor(Good):
    """Rounds a factor without a gradient to float32: its gradient is that of another energy."""

    def energy(self, step):
        weight = step.x0.detach().abs().float().double()
        return (weight * step.x0.square()).flatten(1).mean(1)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Narrow, "computed in torch.float32"),
        (Constant, "must follow by .to"),
        (Factor, "computed in torch.float32"),
    ],
)
def test_a_type_that_is_too_narrow_is_called_so(cls, message):
    with pytest.raises(AssertionError, match=message):
        run_check(cls, "energy")


@dataclass(kw_only=True)
class Hidden(Good):
    """An option that changes on its way (2026)."""

    times: int = 1

    def __post_init__(self):
        self.times += 1


@dataclass(kw_only=True)
class Required(Good):
    """An option without a default (2026)."""

    amount: float


@pytest.mark.parametrize(
    ("cls", "check", "says"),
    [
        (Mixed, "batch", "differ by"),
        (OneCondition, "batch", "image 1 differ by"),
        (Hook, "restored", "after a run the pipeline differs in unet.._forward_hooks"),
        (Wrapped, "restored", "after an exception .* unet..forward"),
        (Weights, "restored", "conv_in.bias"),
        (Shape, "energy", r"one number per image"),
        (Infinite, "energy", "not finite"),
        (Gradient, "energy", "finite differences"),
        (Idle, "acts", "those without it"),
        (Eager, "window", "it acts at 0"),
        (Random, "repeatable", "a second run differs"),
        (Memory, "repeatable", "a second run differs"),
        (Unsourced, "documented", "no paper"),
        (Hidden, "config", "comes back as"),
        (Required, "constructs", "amount"),
        pytest.param(Mixed, "rows_on_scenes", "differ by", marks=pytest.mark.full),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_guidance_is_caught(cls, check, says):
    with pytest.raises(AssertionError, match=f"{check}: .*{says}"):
        check_guidance(cls, [check])


@pytest.mark.parametrize("check", TIERED)
def test_the_good_one_is_good(check):
    assert run_check(Good, check) in (None, NOT_ITS_KIND[1])


def test_the_engine_sees_what_a_hook_does():
    assert check_guidance(Silent, ["acts"]) == {"acts": "holds"}


class Squares(Good):
    """Wants a condition of its own kind (2026)."""

    @classmethod
    def example_condition(cls):
        return Condition("a blue square", "red")

    def prepare(self, run):
        assert all(c.prompt.startswith("a blue square") for c in run.conditions)


def test_a_guidance_brings_its_own_condition():
    assert check_guidance(Squares, ["batch", "acts"]) == {"batch": "holds", "acts": "holds"}


def test_all_failures_are_told_at_once():
    with pytest.raises(AssertionError) as error:
        check_guidance(Shape, ["constructs", "energy", "half"])
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()] == [
        "Shape fails",
        "energy",
        "half",
    ]


def test_a_waiver_is_reported_and_must_name_a_check():
    class Waived(Gradient):
        waived: ClassVar[dict[str, str]] = {"energy": "a stop-gradient, by the paper"}

    assert check_guidance(Waived, ["energy"]) == {"energy": "a stop-gradient, by the paper"}
    with pytest.raises(GuidekitError, match="no check 'enrgy'"):
        check_guidance(type("Odd", (Good,), {"waived": {"enrgy": "?"}}), [])
    with pytest.raises(GuidekitError, match="no check 'speed'; there are constructs"):
        check_guidance(Good, ["speed"])


@pytest.mark.full
@pytest.mark.parametrize("name", ["zest", "pww"])
def test_rows_never_mix_on_the_default_model(name):
    subject = BuiltIn(Registry().guidance_class(name), DEFAULT)
    assert rows(subject) is None


def reads_segments(cls):
    source = inspect.getsource(sys.modules[cls.__module__])
    return re.search(r"segment_masks|TokenMoves|\.segments", source) is not None


PLACED = sorted(name for name, cls in GUIDANCES.items() if reads_segments(cls))


@pytest.mark.parametrize("name", PLACED)
def test_the_strength_of_a_segment_is_read(name):
    def drawn(strength):
        left, right = box_mask((0, 0, 0.6, 1)), box_mask((0.4, 0, 1, 1))
        segments = Segment("red circle", left, strength), Segment("blue square", right)
        words = Condition("a red circle and a blue square", segments=segments)
        run = sample(sd_pipeline(), words, GUIDANCES[name].example(), seeds=[0], steps=2)
        return run.finish().latents

    assert len(PLACED) == 8
    assert not torch.equal(drawn(1.0), drawn(0.3))
