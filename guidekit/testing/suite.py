"""What every guidance must hold to, as checks that a plugin's author runs on tiny real pipelines.

    from guidekit.testing import check_guidance
    check_guidance(Vignette)

or, once the plugin is installed, `pytest --guidekit-plugin vignette`. A check that does not hold by
design is named in the class's `waived` with the reason, which is then reported in its place.
"""

import contextlib
import dataclasses
import inspect
import json
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils import logging
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guidekit.backbones.denoiser import Denoiser
from guidekit.blocks import BlockCall
from guidekit.branches import Branch
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.registry import Registry
from guidekit.step import Step
from guidekit.taps import find_sites
from guidekit.testing.built_ins import MODELS, BuiltIn, rows
from guidekit.testing.miniatures import sd_pipeline, sdxl_pipeline
from guidekit.testing.subject import CONTROL, SEEDS, Subject, same, state

__all__ = ["CHECKS", "check_guidance", "run_check", "sd_pipeline", "sdxl_pipeline"]

TOLERANCE = 1e-4  # of full range, between an image alone and in a batch
SOURCE = re.compile(
    r"arxiv:?\s?\d{4}\.\d{4,5}|doi\.org|doi:|https?://|\b(19|20)\d\d\b", re.IGNORECASE
)


def constructs(subject: Subject) -> None:
    """Every field has a default, and `example` gives an instance of the class."""
    subject.cls()
    found = type(subject.cls.example())
    assert issubclass(found, subject.cls), f"example() returns a {found.__name__}"


def documented(subject: Subject) -> None:
    """The docstring of the class or of its module cites a source: a year, an arXiv id, a link."""
    module = getattr(inspect.getmodule(subject.cls), "__doc__", None) or ""
    own = subject.cls.__dict__.get("__doc__") or ""
    # A dataclass without a docstring gets its signature for one.
    written = own and not own.startswith(f"{subject.cls.__name__}(")
    assert written, "the class has no docstring"
    assert SOURCE.search(f"{module}\n{own}"), "no paper, year or link in the docstrings"


def energy(subject: Subject) -> str | None:
    """The energy is finite, (B,), and its gradient that of finite differences in float64."""
    if not subject.cls().has_energy:
        return "it has no energy"
    guidance = subject.example(start=0.0, stop=1.0)
    sampling = subject.sampling(guidance, pipe=subject.build().to(torch.float64))
    found = _recorded(sampling.guidances[0])
    run, timesteps = sampling.run, sampling.run.scheduler.timesteps
    z = run.noise(run.latent_shape, "z").double()
    direction = run.noise(run.latent_shape, "direction").double()
    width = 1e-5
    for index in (0, len(timesteps) // 2):

        def energy_at(x: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
            found.clear()
            sampling.engine.predict(x, timesteps[index], index, len(timesteps))
            return found[0]

        with _types_named():
            value, grad = energy_at(z)
        assert value.shape == (len(run.seeds),), f"the energy has shape {tuple(value.shape)}"
        assert torch.isfinite(value).all(), f"the energy is {value.tolist()}"
        ends = [energy_at(z + sign * width * direction)[0] for sign in (1, -1)]
        numeric = (ends[0] - ends[1]) / (2 * width)
        exact = (grad * direction).sum((1, 2, 3))
        floor = 1e-9 * (1 + value.abs())  # rounding of the energies over the width
        wrong = (exact - numeric).abs() > 1e-3 * numeric.abs() + floor
        assert not wrong.any(), (
            f"along one direction the gradient is {exact.tolist()}, finite differences in float64 "
            f"give {numeric.tolist()}"
        )
    return None


def _recorded(guidance: Guidance) -> list[tuple[Tensor, Tensor]]:
    """Energies and their gradients with respect to z, kept on every call of the energy."""
    found: list[tuple[Tensor, Tensor]] = []
    original = guidance.energy

    def recording(step: Step) -> Tensor:
        with _Narrowing() as narrowing:
            value = original(step)
        kept = not narrowing.found and value.dtype == step.z.dtype
        assert kept, (
            f"the energy is computed in {narrowing.found or value.dtype}, and this check gives it "
            f"{step.z.dtype}: compute in the dtype of step.z (no .float(); constants and networks "
            "of prepare follow by .to(step.z.dtype))"
        )
        (grad,) = torch.autograd.grad(value.sum(), step.z, retain_graph=True)
        found.append((value.detach(), grad))
        return value

    guidance.energy = recording
    return found


@contextlib.contextmanager
def _types_named() -> Iterator[None]:
    """What torch says of mixed types, with what to do about it."""
    try:
        yield
    except RuntimeError as error:
        if "dtype" not in str(error) and "but found" not in str(error):
            raise
        raise AssertionError(
            f"{error}: this check gives float64; constants and networks that prepare makes must "
            "follow by .to(step.z.dtype)"
        ) from error


class _Narrowing(TorchDispatchMode):
    """Notes the first cast of a float64 tensor with numbers to a narrower type."""

    def __init__(self) -> None:
        super().__init__()
        self.found: torch.dtype | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64
        if cast and out.is_floating_point() and out.dtype != torch.float64:
            self.found = self.found or (None if _embeds_numbers() else out.dtype)
        return out


def _embeds_numbers() -> bool:
    """Whether diffusers is embedding timesteps or sizes: in float32 whatever the model's type is.

    They have no gradient, so nothing of the energy's is lost there.
    """
    names = {frame.f_code.co_name for frame, _ in traceback.walk_stack(None)}
    return get_timestep_embedding.__name__ in names


def scale_0(subject: Subject) -> None:
    """Scale 0 is bit-identical to no plugin."""
    without = subject.plain
    idle = subject.sampling(subject.example(scale=0.0)).finish()
    assert torch.equal(idle.images, without.images), "images differ from those without it"


def window(subject: Subject) -> None:
    """Steps before start and under sigma_stop are bit-identical to those without the plugin."""
    begin = 0.3  # of three steps the middle one
    bare = subject.sampling()
    levels = bare.run.levels
    end = (levels.at(1).sigma * levels.at(2).sigma) ** 0.5
    window = {"start": begin, "stop": 1.0, "sigma_start": None, "sigma_stop": end}
    for step in subject.sampling(subject.example(**window)):
        with torch.no_grad():
            # DDIM keeps no state, so any step of the plain run can be asked for.
            expected = bare.engine.predict(step.z, step.timestep, step.index, step.n)
        same = torch.equal(step.prediction, expected.prediction)
        inside = step.frac >= begin and step.level.sigma > end
        same = same and torch.equal(step.z, step.carried)
        assert inside or same, (
            f"with start={begin} and sigma_stop={end:.3g} it acts at {step.frac:.2g} of the steps "
            f"and sigma {step.level.sigma:.3g}"
        )


def batch(subject: Subject) -> None:
    """An image drawn in a batch of two is the same alone.

    Within 1e-4 of full range, and within a hundredth of what the guidance does to it, so that a
    weak example hides nothing.
    """
    together = subject.sampling(subject.example(), particles=1).finish()
    plain = subject.sampling(particles=1).finish() if subject.particles > 1 else subject.plain
    for i in range(len(SEEDS)):
        alone = subject.sampling(subject.example(), images=(i,), particles=1).finish()
        for kind in ("images", "latents"):
            one, two, bare = (
                getattr(s, kind)[j] for s, j in ((alone, 0), (together, i), (plain, i))
            )
            # Images have range 1; latents the range that they have.
            full = 1.0 if kind == "images" else float(two.max() - two.min())
            effect = float((two - bare).abs().max())
            limit = min(TOLERANCE * full, max(0.01 * effect, 0.1 * TOLERANCE * full))
            gap = float((one - two).abs().max())
            assert gap < limit, f"{kind} of image {i} differ by {gap:.2g} from those alone"


def groups(subject: Subject) -> str | None:
    """A group of images is the same alone and beside another group, within 1e-4 of full range."""
    count = subject.particles
    if count == 1:
        return "images of a group do not see each other in it"
    together = subject.sampling(subject.example()).finish()
    for i in range(len(SEEDS)):
        alone = subject.sampling(subject.example(), images=(i,)).finish()
        gap = (alone.images - together.images[i * count : (i + 1) * count]).abs().max()
        assert gap < TOLERANCE, f"group {i} differs by {float(gap):.2g} beside another group"
    return None


def repeatable(subject: Subject) -> None:
    """The same instance draws the same images again, bit for bit, and moves no global seed."""
    guidance = subject.example()
    first = subject.sampling(guidance).finish()
    torch.randn(3)
    before = torch.get_rng_state()
    second = subject.sampling(guidance).finish()
    assert torch.equal(first.latents, second.latents), (
        "a second run differs: set up in prepare what changes, draw noise by step.noise"
    )
    assert torch.equal(before, torch.get_rng_state()), "it draws from torch's global generator"


def restored(subject: Subject) -> None:
    """The model is as it was, also after an exception in the middle and an abandoned run."""
    pipe, _ = subject.pipe, subject.plain  # text encoders install hooks at their first use
    for model in Denoiser(pipe).models:  # flags that a run must put back
        model.train().requires_grad_(True)
    before = state(pipe)
    subject.sampling(subject.example()).finish()
    same(before, state(pipe), "after a run")
    with contextlib.suppress(_Interrupted):
        subject.sampling(subject.example(), _Interruption()).finish()
    same(before, state(pipe), "after an exception in the middle of a run")
    steps = iter(subject.sampling(subject.example()))
    next(steps)
    steps.close()
    same(before, state(pipe), "after a run that was given up")


class _Interrupted(Exception):
    """Raised in the middle of a denoiser call."""


class _Interruption(Guidance):
    """Raises in the last block of the second step's first call."""

    def prepare(self, run) -> None:
        run.tap_blocks(self, find_sites(run.denoiser.model, "*", kind="block")[-1])

    def touches(self, branch: Branch) -> bool:
        return True

    def edit_block(self, step: Step, branch: Branch, call: BlockCall) -> None:
        if step.index == 1:
            raise _Interrupted


def config(subject: Subject) -> None:
    """The fields survive JSON and the registry: what run.json keeps makes the same instance."""
    example = subject.cls.example()
    names = [f.name for f in dataclasses.fields(example) if f.init]
    values = {name: getattr(example, name) for name in names}
    kept = json.loads(json.dumps(values, default=str))
    again = _Just(subject.cls).make_guidance("example", kept)
    found = {name: getattr(again, name) for name in names}
    assert found == values, f"{values} comes back as {found}"


class _Just(Registry):
    """A registry of one class, which need not be installed."""

    def __init__(self, cls: type[Guidance]):
        super().__init__()
        self._cls = cls

    def guidance_class(self, name: str) -> type[Guidance]:
        return self._cls


def half(subject: Subject) -> None:
    """It runs in bfloat16 and float16, and the images are finite."""
    for dtype in (torch.bfloat16, torch.float16):
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # diffusers warns of float16 in general
        try:
            pipe = subject.build().to(dtype)
        finally:
            logging.set_verbosity(before)
        # One image and two steps: half precision is slow on a CPU.
        drawn = subject.sampling(subject.example(), images=(0,), pipe=pipe, steps=2).finish()
        for kind in ("latents", "images"):
            assert torch.isfinite(getattr(drawn, kind)).all(), f"{kind} are not finite in {dtype}"


def acts(subject: Subject) -> None:
    """It says in the account that it acted, and the images show it."""
    guidance = subject.example()
    drawn = subject.sampling(guidance).finish()
    assert drawn.account.acted(guidance.name), "the account has no gradient and no edit of it"
    if subject.cls.accept is Guidance.accept:
        assert not torch.equal(drawn.latents, subject.plain.latents), (
            "the images are those without it"
        )


# A check returns the reason for which it does not apply, or None.
_ON_SD = (
    constructs,
    documented,
    config,
    energy,
    scale_0,
    window,
    batch,
    groups,
    repeatable,
    restored,
    half,
    acts,
)
# Two text encoders; classes in place of text; joint attention, flow matching, three text encoders.
_ON_OTHERS = {
    "sdxl": (acts, scale_0, energy, restored),
    "dit": (acts, scale_0, energy, restored),
    "sd3": (acts, scale_0, energy, restored, window, batch),
}
# A ControlNet beside Stable Diffusion, whose residuals depend on z.
_WITH_CONTROL = (acts, scale_0, energy, restored, batch)
# Name: the check, the family of the pipeline, or the built-in model.
CHECKS: dict[str, tuple[Callable[[Any], str | None], str]] = {
    **{check.__name__: (check, "sd") for check in _ON_SD},
    **{
        f"{check.__name__}_on_{family}": (check, family)
        for family, checks in _ON_OTHERS.items()
        for check in checks
    },
    **{f"rows_on_{model.replace('-', '_')}": (rows, model) for model in MODELS},
    **{f"{check.__name__}_with_control": (check, CONTROL) for check in _WITH_CONTROL},
}


def run_check(cls: type[Guidance], name: str) -> str | None:
    """Runs one check; returns the reason for which it does not apply, None if it holds.

    A check that is waived is so on every family. A family without what the class says it needs must
    be refused, and the refusal is the reason. Raises AssertionError if the check does not hold, or
    whatever the guidance raised.
    """
    check, family = CHECKS[name]
    for waived in (name, check.__name__):
        if waived in cls.waived:
            return cls.waived[waived]
    with warnings.catch_warnings():
        # An empty window warns by design; what matters else is asserted.
        warnings.simplefilter("ignore")
        with torch.random.fork_rng(devices=[]):
            subject = BuiltIn(cls, family) if family in MODELS else Subject(cls, family)
            return subject.refusal() or check(subject)


def check_guidance(cls: type[Guidance], checks: Sequence[str] = tuple(CHECKS)) -> dict[str, str]:
    """Runs the checks and returns {name: "holds", or the reason for which it does not apply}.

    Raises AssertionError with a line for each check that fails, and ValueError for a waiver or a
    check of a name that there is not.
    """
    for name in [*checks, *cls.waived]:
        if name not in CHECKS:
            raise GuidekitError(f"no check {name!r}; there are {', '.join(CHECKS)}")
    results, failures = {}, []
    for name in checks:
        try:
            results[name] = run_check(cls, name) or "holds"
        except Exception as error:  # an author wants all failures at once
            text = str(error) or type(error).__name__
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            failures.append(f"{name}: {kind}{text}")
    if failures:
        raise AssertionError(f"{cls.__name__} fails\n  " + "\n  ".join(failures))
    return results
