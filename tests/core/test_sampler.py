"""The sampling loop: the bare pipeline's images, recurrence, batches, seeds and acceptance."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import tiny
from guidekit import Condition, Guidance, Sampling, Segment, box_mask, draw
from guidekit.errors import GuidekitError
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest

SCHEDULERS = [
    DDIMScheduler,
    pytest.param(PNDMScheduler, marks=pytest.mark.full),
    EulerDiscreteScheduler,
    pytest.param(EulerAncestralDiscreteScheduler, marks=pytest.mark.full),
    pytest.param(DPMSolverMultistepScheduler, marks=pytest.mark.full),
    pytest.param(UniPCMultistepScheduler, marks=pytest.mark.full),
    pytest.param(HeunDiscreteScheduler, marks=pytest.mark.full),
    pytest.param(DDPMScheduler, marks=pytest.mark.full),
]
SEGMENTS = (Segment("red circle", box_mask((0, 0, 0.5, 1))),)
RED = Condition("a red circle", "blue", SEGMENTS)
BLUE = Condition("a blue square on white", segments=(Segment("white", box_mask((0, 0, 1, 0.5))),))


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@dataclass(kw_only=True)
class Repeat(Guidance):
    """Does every step three times and keeps what it sees."""

    times: int = 3

    def prepare(self, run):
        self.seen = []

    def repeats(self, step):
        return self.times

    def edit_sample(self, step, z):
        scheduler = step.run.scheduler
        self.seen.append((step, z, scheduler.step_index, copy.deepcopy(scheduler.model_outputs)))
        return z


def bare(pipe, conditions, seeds, scheduler=None, eta=0.0, **options):
    """Images of the diffusers pipeline itself."""
    before = pipe.scheduler
    pipe.scheduler = scheduler or before
    negatives = [c.negative for c in conditions]
    try:
        return pipe(
            [c.prompt for c in conditions],
            negative_prompt=negatives if any(negatives) else None,
            num_inference_steps=4,
            guidance_scale=5.0,
            eta=eta,
            output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **options,
        ).images
    finally:
        pipe.scheduler = before


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_no_plugin_and_scale_0_are_the_bare_pipeline(pipe, cls):
    scheduler = cls.from_config(pipe.scheduler.config)
    options = {"height": 32, "width": 48}
    expected = bare(pipe, [RED, BLUE], [5, 6], scheduler, **options)
    for guidances in ([], [Zest(scale=0), PaintWithWords(scale=0)]):
        ours = Sampling(
            pipe,
            [RED, BLUE],
            guidances,
            seeds=[5, 6],
            steps=4,
            cfg=5.0,
            scheduler=scheduler,
            **options,
        ).finish()
        assert torch.equal(ours.images, expected)


def test_eta_is_ddims(pipe):
    expected = bare(pipe, [RED], [5], eta=0.7)
    ours = Sampling(pipe, RED, seeds=[5], steps=4, cfg=5.0, eta=0.7).finish()
    assert torch.equal(ours.images, expected)
    assert not torch.equal(ours.images, bare(pipe, [RED], [5]))


@pytest.mark.parametrize(
    "cls",
    [EulerDiscreteScheduler, pytest.param(DPMSolverMultistepScheduler, marks=pytest.mark.full)],
)
def test_sdxl_is_the_bare_pipeline(cls):
    pipe = tiny.sdxl_pipeline()
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    empty = Condition("a blue square")  # without a negative prompt SDXL's null is zeros
    for condition in (RED, empty):
        expected = bare(pipe, [condition] * 2, [5, 6], height=32, width=48)
        ours = Sampling(pipe, condition, seeds=[5, 6], steps=4, cfg=5.0, height=32, width=48)
        assert torch.equal(ours.finish().images, expected)


def test_a_guidance_outside_of_its_window_leaves_the_pictures(pipe):
    with pytest.warns(UserWarning, match="zest never acted"):
        guided = Sampling(pipe, RED, [Zest(start=0.9, stop=0.95)], steps=3).finish()
    assert torch.equal(guided.images, Sampling(pipe, RED, steps=3).finish().images)


@pytest.mark.parametrize(
    "guidances", [[], pytest.param([Zest()], marks=pytest.mark.full), [PaintWithWords(), Zest()]]
)
def test_a_picture_does_not_depend_on_its_batch(pipe, guidances):
    together = Sampling(pipe, [RED, BLUE], guidances, seeds=[5, 6], steps=3, eta=0.5).finish()
    for i, condition in enumerate([RED, BLUE]):
        alone = Sampling(pipe, condition, guidances, seeds=[5 + i], steps=3, eta=0.5).finish()
        assert (alone.images[0] - together.images[i]).abs().max() < 1e-4


def test_the_pipeline_and_its_scheduler_are_left_as_they_were(pipe):
    before = dict(vars(pipe.scheduler))
    Sampling(pipe, RED, [Zest()], steps=3).finish()
    assert vars(pipe.scheduler).keys() == before.keys()
    assert all(vars(pipe.scheduler)[k] is v for k, v in before.items())


class Noisy(Guidance):
    """Draws noise at every step, from the run and from torch's own generator."""

    def edit_sample(self, step, z):
        torch.randn(3)
        self.noise = step.noise("mine")
        return z


class Other(Noisy):
    """Draws under another tag."""

    def edit_sample(self, step, z):
        step.noise("other")
        step.noise("other")
        return z


def test_noise_of_a_plugin_depends_on_seed_step_and_tag_alone(pipe):
    one = Sampling(pipe, RED, [Noisy()], seeds=[5], steps=3, eta=1.0)
    two = Sampling(pipe, [BLUE, RED], [Other(), Noisy()], seeds=[4, 5], steps=3, eta=1.0)
    first, second = one.guidances[0], two.guidances[1]
    torch.manual_seed(0)
    noises = []
    for _, _ in zip(one, two, strict=True):
        assert torch.equal(first.noise[0], second.noise[1])
        assert not torch.equal(second.noise[0], second.noise[1])
        noises.append(first.noise)
    assert not torch.equal(noises[0], noises[1])
    plain = Sampling(pipe, RED, seeds=[5], steps=3, eta=1.0).finish()
    assert torch.equal(one.images, plain.images)


def test_recurrence_starts_each_repeat_from_the_same_scheduler_state(pipe):
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    sampling = Sampling(pipe, RED, [Repeat()], seeds=[5], steps=3, scheduler=scheduler).finish()
    (guidance,) = sampling.guidances
    assert [(s.index, s.repeat) for s, *_ in guidance.seen] == [
        (i, r) for i in range(3) for r in range(3)
    ]
    for i in range(0, 9, 3):
        (a, z, index, outs), (b, _, index_b, outs_b), _ = guidance.seen[i : i + 3]
        assert index == index_b
        assert a.level == b.level
        assert (outs[0] is None) == (outs_b[0] is None)
        assert outs[0] is None or torch.equal(outs[0], outs_b[0])  # the history before this step
        noise = sampling.run.noise((4, 16, 16), a.index, 1, "recurrence")
        gain = a.level.a / a.next_level.a
        std = (a.level.s**2 - (gain * a.next_level.s) ** 2) ** 0.5
        torch.testing.assert_close(b.z, gain * z + std * noise)


def test_one_repeat_is_none(pipe):
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    options = {"seeds": [5], "steps": 3, "scheduler": scheduler}
    once = Sampling(pipe, RED, [Repeat(times=1)], **options)
    plain = Sampling(pipe, RED, **options).finish()
    assert torch.equal(once.finish().images, plain.images)


@pytest.mark.parametrize("cls", [PNDMScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler])
def test_edits_of_z_are_refused_where_the_scheduler_would_lose_them(pipe, cls):
    scheduler = cls.from_config(pipe.scheduler.config)
    with pytest.raises(GuidekitError, match="noisy edits z, and .* does not start"):
        Sampling(pipe, RED, [Noisy()], steps=5, scheduler=scheduler).finish()


class Picky(Guidance):
    """Rejects the first images of one condition."""

    tries: ClassVar[list] = []

    def prepare(self, run):
        self.run = run
        self.tries.append(list(run.seeds))

    def accept(self, images):
        return torch.tensor([seed != 6 for seed in self.run.seeds])


def test_rejected_pictures_are_drawn_again_from_derived_seeds(pipe):
    guidance = Picky()
    guidance.tries.clear()
    images = draw(pipe, [RED, BLUE, RED], [guidance], seeds=[5, 6, 7], batch=2, tries=3, steps=2)
    assert guidance.tries[:2] == [[5, 6], [7]]
    (again,) = guidance.tries[2:]  # one image, once: its second seed is accepted
    plain = draw(pipe, [RED, BLUE, RED], seeds=[5, again[0], 7], batch=1, steps=2)
    assert (images - plain).abs().max() < 1e-4


def test_tries_are_bounded_and_the_last_draw_stays(pipe):
    class Never(Picky):
        tries: ClassVar[list] = []

        def accept(self, images):
            return torch.zeros(len(images), dtype=torch.bool)

    guidance = Never()
    images = draw(pipe, RED, [guidance], seeds=[5], tries=3, steps=2)
    assert len(guidance.tries) == 3
    assert len({s for (s,) in guidance.tries}) == 3
    last = draw(pipe, RED, seeds=guidance.tries[-1], steps=2)
    assert torch.equal(images, last)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps"),
        ({"cfg": -1.0}, "cfg"),
        ({"eta": float("nan")}, "eta"),
        ({"seeds": []}, "no seeds"),
        ({"height": 33}, "multiples of 8"),
        ({"memory": "little"}, "memory must be one of"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
        ({"conditions": [RED]}, "one per seed"),
        ({"conditions": Condition("red " * 90)}, "tokens"),
        ({"conditions": Condition("red", "blue " * 90)}, "tokens"),
    ],
)
def test_settings_that_cannot_work_raise(pipe, options, message):
    given = {"conditions": RED, "seeds": [1, 2]} | options
    with pytest.raises(GuidekitError, match=message):
        Sampling(pipe, **given)


def test_eta_of_a_scheduler_without_it_raises(pipe):
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(GuidekitError, match="has no eta"):
        Sampling(pipe, RED, eta=0.5, scheduler=scheduler)


def test_too_few_steps_for_pndm():
    scheduler = PNDMScheduler(skip_prk_steps=False)
    with pytest.raises(GuidekitError, match="PNDMScheduler needs at least 4 steps, not 3"):
        Sampling(tiny.sd_pipeline(), Condition("a"), steps=3, scheduler=scheduler)
