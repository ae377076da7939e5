"""Another z at the same level: it is what the step starts from, and each image stops by itself."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

import guidekit
import tiny
from guidekit import Condition, FeatureRead, Guidance, Sampling
from guidekit.errors import GuidekitError, NonFiniteError
from guidekit.testing import check_guidance
from guidekit.testing.miniatures import sd3_pipeline
from guidekit.toolbox import descend

RED = Condition("a red circle")
BLUE = Condition("a blue square")


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@dataclass(kw_only=True)
class Shift(Guidance):
    """Shifts the first z."""

    amount: float = 0.5

    def refine(self, step, z):
        return z + self.amount if step.index == 0 else z


@dataclass(kw_only=True)
class Begun(Guidance):
    """Begins with the first noise, shifted."""

    z: torch.Tensor | None = None

    def begin(self, run):
        return self.z + 0.5


def pair(pipe, scheduler, conditions=RED, seeds=(5,), **options):
    given = {"seeds": seeds, "steps": 4, "cfg": 5.0, "scheduler": scheduler, **options}
    return given, Sampling(pipe, conditions, [Shift()], **given)


@pytest.mark.parametrize(
    "cls",
    [
        DDIMScheduler,
        EulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
        pytest.param(HeunDiscreteScheduler, marks=pytest.mark.full),
        # Its second call does the first step again, from the z that it kept.
        pytest.param(PNDMScheduler, marks=pytest.mark.full),
        None,
    ],
)
def test_the_step_starts_from_the_refined_z(pipe, cls):
    pipe = sd3_pipeline() if cls is None else pipe
    scheduler = pipe.scheduler if cls is None else cls.from_config(pipe.scheduler.config)
    given, refined = pair(pipe, scheduler)
    first = next(iter(refined))
    assert torch.equal(first.z, first.carried + 0.5)
    assert first.begins_step
    begun = Sampling(pipe, RED, [Begun(z=first.carried)], **given).finish()
    assert torch.equal(Sampling(pipe, RED, [Shift()], **given).finish().latents, begun.latents)


@pytest.mark.parametrize("cls", [SASolverScheduler, UniPCMultistepScheduler])
def test_a_scheduler_that_would_lose_it_is_refused(pipe, cls):
    @dataclass(kw_only=True)
    class Always(Guidance):
        """Shifts every z."""

        def refine(self, step, z):
            return z + 0.1

    scheduler = cls.from_config(pipe.scheduler.config)
    with pytest.raises(GuidekitError, match="always refines z, and .* does not start every step"):
        Sampling(pipe, RED, [Always()], steps=4, scheduler=scheduler).finish()


@dataclass(kw_only=True)
class Calm(Guidance):
    """Descends on the size of features, image by image (2026)."""

    scale: float = 0.5
    limit: int = 3
    until: tuple[float, ...] = (0.0,)

    def prepare(self, run):
        (block,) = list(run.blocks("middle"))[:1]
        self.read = run.read(self, FeatureRead((block,)), main=False)

    def _size(self, step, z):
        found = step.denoise(step.model_input(z), step.timestep, self, stop=True)
        (features,) = found.features(self.read).values()
        return features.to(z.dtype).square().flatten(1).mean(1)

    def refine(self, step, z):
        until = z.new_tensor(self.until)
        limit = self.limit if self.scale else 0
        return descend(step, self, z, lambda x: self._size(step, x), self.scale, limit, until)


def drawn(pipe, guidances=(), conditions=(RED, BLUE), seeds=(5, 6), **options):
    given = {"steps": 3, "cfg": 5.0, **options}
    return Sampling(pipe, list(conditions), guidances, seeds=list(seeds), **given).finish()


def test_a_loop_of_no_steps_is_none(pipe):
    with pytest.warns(UserWarning, match="calm never acted"):
        idle = drawn(pipe, [Calm(limit=0)])
    assert torch.equal(idle.latents, drawn(pipe).latents)


def test_each_image_stops_by_itself_and_the_account_says_when(pipe):
    free = drawn(pipe, [Calm(stop=0.3)])
    (row,) = [r for r in free.account.rows if r["step"] == 0]
    assert row["moves"] == [3, 3]
    assert row["refined"] < row["energy"]
    between = (row["energy"][0] + row["refined"][0]) / 2
    both = drawn(pipe, [Calm(stop=0.3, until=(between, 1e9))])
    (row,) = [r for r in both.account.rows if r["step"] == 0]
    assert 0 < row["moves"][0] < 3
    assert row["moves"][1] == 0
    assert row["grad_norm"][1] == 0
    assert both.account.edits == {"calm": 1}
    alone = drawn(pipe, [Calm(stop=0.3, until=(between,))], [RED], [5])
    torch.testing.assert_close(both.latents[:1], alone.latents, rtol=1e-4, atol=1e-4)
    plain = drawn(pipe)
    torch.testing.assert_close(both.latents[1:], plain.latents[1:], rtol=1e-5, atol=1e-5)


def test_a_moved_image_has_less_energy_by_its_own_gradient(pipe):
    """One small move changes the energy by minus amount times the squared norm."""
    pipe64 = tiny.sd_pipeline().to(torch.float64)
    small = Calm(scale=1e-3, limit=2, stop=0.3)
    (row,) = drawn(pipe64, [small], steps=1).account.rows
    first, last = torch.tensor([row["energy"], row["refined"]])
    expected = first - 1e-3 * torch.tensor(row["grad_norm"]) ** 2
    torch.testing.assert_close(last, expected, rtol=2e-4, atol=1e-5)


def test_in_a_pipeline_it_is_the_same(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    with guidekit.attach(pipe, [Calm(), Shift()]) as attached:
        found = pipe(
            [RED.prompt, BLUE.prompt],
            num_inference_steps=3,
            guidance_scale=5.0,
            output_type="latent",
            generator=generators,
        ).images
    ours = drawn(pipe, [Calm(), Shift()])
    assert torch.equal(found, ours.latents)
    assert attached.account.edits == ours.account.edits == {"calm": 3, "shift": 1}


@dataclass(kw_only=True)
class Spoilt(Guidance):
    """Refines the second image into NaN."""

    wrong: ClassVar = torch.tensor([0.0, float("nan")])[:, None, None, None]

    def refine(self, step, z):
        return z + self.wrong


def test_what_is_not_finite_follows_the_policy(pipe):
    with pytest.raises(NonFiniteError, match=r"step 0 to NaN or infinity for seeds \[6\]"):
        drawn(pipe, [Spoilt()])
    with pytest.warns(UserWarning, match="spoilt never acted"):
        left = drawn(pipe, [Spoilt()], nonfinite="zero")
    assert torch.equal(left.latents, drawn(pipe).latents)
    assert "seeds [6]; they were left" in left.account.notes[0]


def test_a_z_of_another_shape_is_refused(pipe):
    wrong = copy.copy(Shift())
    wrong.refine = lambda step, z: z[:1]
    with pytest.raises(GuidekitError, match="shift refines z"):
        drawn(pipe, [wrong])


def test_noise_alone_is_not_informative(pipe):
    flow = next(iter(Sampling(sd3_pipeline(), RED, steps=2)))
    assert flow.level.a == 0
    assert not flow.informative
    assert next(iter(Sampling(pipe, RED, steps=2))).informative


@pytest.mark.full
def test_a_guidance_that_refines_holds():
    check_guidance(Calm)
