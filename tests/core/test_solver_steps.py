"""Steps of a solver with several calls: pushes, recurrence, pipelines begun in the middle."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)

import guidekit
import tiny
from guidekit import Condition, Guidance, Sampling, Segment, box_mask
from guidekit_zest import Zest

SEGMENTS = (Segment("red circle", box_mask((0, 0, 0.5, 1))),)
RED = Condition("a red circle", segments=SEGMENTS)
TWO_STAGE = [
    HeunDiscreteScheduler,
    pytest.param(KDPM2DiscreteScheduler, marks=pytest.mark.full),
    DPMSolverSinglestepScheduler,
]


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def of(pipe, cls):
    return cls.from_config(tiny.sd_pipeline().scheduler.config)


@dataclass(kw_only=True)
class Again(Guidance):
    """Does every step of the solver three times and keeps what it sees."""

    times: int = 3

    def prepare(self, run):
        self.run, self.seen = run, []

    def repeats(self, step):
        return self.times

    def edit_prediction(self, step, out):
        self.seen.append((step.index, step.repeat, step.z))
        return out


@pytest.mark.parametrize("cls", TWO_STAGE)
def test_recurrence_covers_all_calls_of_a_step(pipe, cls):
    given = {"seeds": [5], "steps": 4, "scheduler": of(pipe, cls)}
    sampling = Sampling(pipe, RED, [Again()], **given)
    (guidance,) = sampling.guidances
    shown = [(step.index, step.repeat) for step in sampling]
    levels = sampling.run.levels
    assert {len(calls) for calls in levels.steps} == {1, 2}
    expected = [(k, r) for calls in levels.steps for r in range(3) for k in calls]
    assert [(k, r) for k, r, _ in guidance.seen] == expected
    assert shown == [(k, r) for k, r in expected if r == 2]
    starts = {(k, r): z for k, r, z in guidance.seen}
    calls = levels.steps[1]
    for r in (1, 2):  # noise is put back, to the level before the step
        assert not torch.equal(starts[calls[0], r], starts[calls[0], 0])
        spread = float(starts[calls[0], r].std()) / float(starts[calls[0], 0].std())
        assert spread == pytest.approx(1.0, abs=0.35)
    plain = Sampling(pipe, RED, [Again(times=1)], **given).finish()
    assert torch.equal(plain.latents, Sampling(pipe, RED, **given).finish().latents)


@pytest.mark.parametrize("cls", [*TWO_STAGE, PNDMScheduler])
def test_zest_pushes_once_a_step_of_the_solver(pipe, cls):
    given = {"seeds": [5], "steps": 6, "scheduler": of(pipe, cls)}
    sampling = Sampling(pipe, RED, [Zest(stop=1.0, scale=0.1)], **given).finish()
    rows = Counter(row["step"] for row in sampling.account.rows)
    ends = [calls[-1] for calls in sampling.run.levels.steps]
    assert [*rows] == ends
    assert set(rows.values()) == {1}
    assert sampling.engine.injector.backwards == len(ends)


@pytest.mark.parametrize(
    "cls",
    [
        DDIMScheduler,
        pytest.param(PNDMScheduler, marks=pytest.mark.full),
        pytest.param(HeunDiscreteScheduler, marks=pytest.mark.full),
        DPMSolverMultistepScheduler,
    ],
)
def test_attached_to_image_to_image_it_is_the_own_loop(pipe, cls):
    pipe.scheduler = of(pipe, cls)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32)
    given = {"image": image, "strength": 0.5}
    zest = Zest(start=0.3, stop=1.0, scale=0.3)  # begins after the scheduler's first step
    ours = Sampling(pipe, RED, [zest], seeds=[5], steps=8, cfg=5.0, **given).finish()
    generator = [torch.Generator().manual_seed(5)]
    with guidekit.attach(other, [zest], segments=SEGMENTS, seeds=[5]) as attached:
        latents = other(
            [RED.prompt],
            num_inference_steps=8,
            guidance_scale=5.0,
            generator=generator,
            output_type="latent",
            **given,
        ).images
    assert attached.account.rows
    assert attached.run.levels.start == ours.run.levels.start > 0
    assert attached.step.level == ours.run.levels.at(attached.step.index)
    assert torch.equal(latents, ours.latents)
