"""A guidance that draws by a loop of its own: on levels in any order, beside other guidances."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

import exact
import guidekit
import tiny
from guidekit import Condition, Guidance, Sampling
from guidekit.errors import GuidekitError
from guidekit.testing.miniatures import sd3_pipeline
from guidekit.toolbox import Downsampling, Grey, Inpainting
from guidekit_red_diff import RedDiff
from guidekit_zest import Zest

RED = Condition("a red circle")
LEFT = torch.ones(8, 8)
LEFT[:, :4] = 0  # the hole
OPERATORS = {"downsampling": Downsampling(4), "inpainting": Inpainting(LEFT), "grey": Grey()}


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@dataclass(kw_only=True)
class Ode(Guidance):
    """First-order steps of its own; asks for the last level before and between them."""

    def solve(self, run, z, predict):
        for k in range(len(run.levels)):
            predict(z, len(run.levels) - 1)
            step = predict(z, k)
            x0 = step.level.x0(step.prediction, step.z)
            eps = step.level.eps(step.prediction, step.z)
            z = step.next_level.a * x0 + step.next_level.s * eps
            yield step, z


@dataclass(kw_only=True)
class Bright(Guidance):
    """Pulls x0 up."""

    scale: float = 3.0

    def energy(self, step):
        return -step.x0.flatten(1).mean(1)


def drawn(pipe, *guidances, scheduler=None, **options):
    given = {"seeds": [5, 6], "steps": 4, "cfg": 5.0, "scheduler": scheduler, **options}
    return Sampling(pipe, RED, guidances, **given).finish()


@pytest.mark.parametrize(
    "cls",
    [
        DDIMScheduler,
        pytest.param(EulerDiscreteScheduler, marks=pytest.mark.full),
        pytest.param(None, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("others", [(), (Bright(),)])
def test_first_order_steps_are_the_schedulers(pipe, cls, others):
    pipe = pipe if cls else sd3_pipeline()
    scheduler = cls.from_config(pipe.scheduler.config) if cls else None
    own = drawn(pipe, Ode(), *others, scheduler=scheduler)
    theirs = drawn(pipe, *others, scheduler=scheduler)
    torch.testing.assert_close(own.latents, theirs.latents, rtol=1e-3, atol=1e-4)
    assert own.account.edits["ode"] == 4
    assert own.images.shape == theirs.images.shape


def test_other_schedulers_lend_their_levels(pipe):
    cls = DPMSolverMultistepScheduler
    found = drawn(pipe, Ode(), scheduler=cls.from_config(pipe.scheduler.config))
    assert torch.isfinite(found.latents).all()
    heun = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(GuidekitError, match="scheduler of one call a step"):
        drawn(pipe, Ode(), scheduler=heun)


def test_what_acts_on_the_schedulers_step_is_refused(pipe):
    segments = (guidekit.Segment("red circle", guidekit.box_mask((0, 0, 0.5, 1))),)
    with pytest.raises(GuidekitError, match=r"zest acts on the scheduler's step \(push\), and ode"):
        Sampling(pipe, Condition("a red circle", segments=segments), [Ode(), Zest()]).finish()
    with pytest.raises(GuidekitError, match="ode and ode-2 both draw by a loop of their own"):
        drawn(pipe, Ode(), Ode())
    with pytest.raises(GuidekitError, match="ode draws by a loop of its own, which a pipeline's"):
        with guidekit.attach(pipe, [Ode()]):
            pass

    class Idle(Ode):
        def solve(self, run, z, predict):
            return iter(())

    with pytest.raises(GuidekitError, match="a solver drew nothing"):
        drawn(pipe, Idle())


@pytest.mark.parametrize("operator", ["downsampling", "inpainting", "grey"])
def test_red_diff_meets_its_measurement(operator):
    """On an exact model, for each image its own, by every operator."""
    images = [torch.full((3, 8, 8), value) for value in (0.5, -0.5)]
    measure = OPERATORS[operator]
    conditions = [Condition(targets={"red-diff": measure.forward(i[None])[0]}) for i in images]
    guidance = RedDiff(operator=operator, hole=(0, 0, 0.5, 1))
    found = Sampling(exact.pipeline(), conditions, [guidance], seeds=[5, 6], steps=40).finish()
    for image, drawn in zip(images, found.latents, strict=True):
        pair = (measure.forward(image[None]), measure.forward(drawn[None]))
        torch.testing.assert_close(*pair, rtol=0, atol=0.2)
    assert [row["step"] for row in found.account.rows] == list(range(40))
    assert all(reward <= 0 for row in found.account.rows for reward in row["reward"])


def test_red_diff_needs_a_measurement():
    with pytest.raises(
        GuidekitError, match="red-diff needs a measurement: --set red-diff.measureme"
    ):
        Sampling(exact.pipeline(), Condition(), [RedDiff()], steps=4)
