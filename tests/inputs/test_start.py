"""Where a run begins: own timesteps or sigmas, latents, an image; as diffusers' pipelines do it."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
)

import guidekit
import tiny
from guidekit import Condition, Guidance, Sampling
from guidekit.errors import GuidekitError
from guidekit.images import to_image
from guidekit.testing.miniatures import sd3_pipeline

RED = Condition("a red circle")
OPTIONS = {"height": 32, "width": 48, "cfg": 5.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def bare(pipe, seeds=(5, 6), cfg=5.0, **options):
    """Latents of the diffusers pipeline itself."""
    prompts = [RED.prompt] * len(seeds)
    given = {"guidance_scale": cfg, "output_type": "latent", "generator": generators(*seeds)}
    return pipe(prompts, **given, **options).images


@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(DDPMScheduler, marks=pytest.mark.full),
        EulerDiscreteScheduler,
        pytest.param(HeunDiscreteScheduler, marks=pytest.mark.full),
    ],
)
def test_own_timesteps_are_the_pipelines(pipe, cls):
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    own = [900, 600, 300, 100]
    expected = bare(pipe, height=32, width=48, timesteps=own)
    ours = Sampling(pipe, RED, seeds=[5, 6], timesteps=own, **OPTIONS).finish()
    assert torch.equal(ours.latents, expected)
    assert ours.run.levels.timesteps[0] == 900


def test_own_sigmas_are_the_pipelines(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    own = [10.0, 4.0, 1.5, 0.0]  # Euler's hold the final one too
    expected = bare(pipe, height=32, width=48, sigmas=own)
    ours = Sampling(pipe, RED, seeds=[5, 6], sigmas=own, **OPTIONS).finish()
    assert torch.equal(ours.latents, expected)
    assert [ours.run.levels.at(k).s for k in range(3)] == pytest.approx(own[:3])
    flow = sd3_pipeline()
    own = [1.0, 0.7, 0.3]
    expected = bare(flow, height=32, width=32, sigmas=own)
    ours = Sampling(flow, RED, seeds=[5, 6], sigmas=own, height=32, width=32, cfg=5.0).finish()
    assert torch.equal(ours.latents, expected)


def test_the_users_scheduler_counts_with_what_was_done_to_it(pipe):
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    root = pipe.scheduler.alphas_cumprod.sqrt()
    pipe.scheduler.alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    expected = bare(pipe, height=32, width=48, num_inference_steps=4)
    ours = Sampling(pipe, RED, seeds=[5, 6], steps=4, **OPTIONS).finish()
    assert torch.equal(ours.latents, expected)
    flow = sd3_pipeline()
    flow.scheduler.set_shift(7.0)
    expected = bare(flow, height=32, width=32, num_inference_steps=4)
    ours = Sampling(flow, RED, seeds=[5, 6], steps=4, height=32, width=32, cfg=5.0).finish()
    assert torch.equal(ours.latents, expected)


def test_a_method_replaced_on_the_scheduler_is_refused(pipe):
    scheduler = DDIMScheduler.from_config(tiny.sd_pipeline().scheduler.config)
    scheduler.step = lambda *args, **kwargs: None
    with pytest.raises(GuidekitError, match="step of the scheduler was replaced"):
        Sampling(pipe, RED, steps=2, scheduler=scheduler)


def test_latents_are_the_pipelines(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(tiny.sd_pipeline().scheduler.config)
    latents = torch.randn(2, 4, 16, 24)
    expected = bare(pipe, height=32, width=48, num_inference_steps=4, latents=latents)
    ours = Sampling(pipe, RED, seeds=[5, 6], steps=4, latents=latents, **OPTIONS).finish()
    assert torch.equal(ours.latents, expected)
    with pytest.raises(GuidekitError, match=r"this run has \(1, 4, 16, 24\)"):
        Sampling(pipe, RED, seeds=[5], steps=4, latents=latents, **OPTIONS)


@pytest.mark.parametrize(
    "cls",
    [
        DDIMScheduler,
        pytest.param(PNDMScheduler, marks=pytest.mark.full),
        EulerDiscreteScheduler,
        pytest.param(DPMSolverMultistepScheduler, marks=pytest.mark.full),
        pytest.param(HeunDiscreteScheduler, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize(
    "strength",
    [0.5, pytest.param(0.8, marks=pytest.mark.full), pytest.param(1.0, marks=pytest.mark.full)],
)
def test_an_image_and_a_strength_are_image_to_image(pipe, cls, strength):
    pipe.scheduler = cls.from_config(tiny.sd_pipeline().scheduler.config)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 32, 48)
    expected = bare(other, image=images, strength=strength, num_inference_steps=6)
    given = {"image": images, "strength": strength, "steps": 6, **OPTIONS}
    ours = Sampling(pipe, RED, seeds=[5, 6], **given).finish()
    assert torch.equal(ours.latents, expected)


def test_image_to_image_of_a_flow_model():
    flow = sd3_pipeline()
    other = StableDiffusion3Img2ImgPipeline(**flow.components)
    other.set_progress_bar_config(disable=True)
    images = torch.rand(1, 3, 32, 32)
    given = {"image": images, "strength": 0.6, "height": 32, "width": 32}
    expected = bare(other, seeds=[5], num_inference_steps=5, **given)
    ours = Sampling(flow, RED, seeds=[5], steps=5, cfg=5.0, **given).finish()
    assert torch.equal(ours.latents, expected)


def test_an_image_is_given_as_people_have_it(pipe, tmp_path):
    pipe.scheduler = DDIMScheduler.from_config(tiny.sd_pipeline().scheduler.config)
    image = to_image(torch.rand(3, 32, 48))
    image.save(tmp_path / "a.png")
    pixels = torch.tensor(list(image.tobytes())).view(32, 48, 3).permute(2, 0, 1) / 255
    drawn = [
        guidekit.sample(pipe, RED, seeds=[5], steps=3, image=one, **OPTIONS).finish().latents
        for one in (image, tmp_path / "a.png", pixels)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"timesteps": [900, 100], "steps": 2}, "timesteps and steps are both given"),
        ({"timesteps": [900, 100], "sigmas": [1.0]}, "timesteps and sigmas are both given"),
        ({"timesteps": [100, 900]}, "must fall"),
        ({"timesteps": [900, 100]}, "DDIMScheduler takes no timesteps; these do: .*DDPMScheduler"),
        ({"strength": 0.5}, "give image too"),
        ({"image": torch.zeros(3, 32, 32), "strength": 1.5}, "at most 1, not 1.5"),
        ({"image": torch.zeros(3, 32, 32), "strength": 0.1, "steps": 4}, "leaves none"),
        ({"image": torch.zeros(3, 32, 32), "latents": torch.zeros(1)}, "both given"),
    ],
)
def test_what_cannot_work_is_refused(pipe, options, message):
    pipe.scheduler = DDIMScheduler.from_config(tiny.sd_pipeline().scheduler.config)
    with pytest.raises(GuidekitError, match=message):
        Sampling(pipe, RED, seeds=[5], **options)


def test_an_image_of_another_size_is_refused(pipe):
    with pytest.raises(GuidekitError, match=r"it is \(3, 32, 48\)"):
        Sampling(pipe, RED, steps=2, image=torch.zeros(3, 16, 16), **OPTIONS)


@dataclass(kw_only=True, eq=False)
class Flat(Guidance):
    """Begins with a grey image at the run's first level."""

    def begin(self, run):
        level = run.levels.at(0)
        x0 = torch.zeros(len(run.seeds), *run.latent_shape)
        return level.a * x0 + level.s * run.noise(run.latent_shape, "flat")


def test_a_guidance_begins_a_run(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(tiny.sd_pipeline().scheduler.config)
    given = {"seeds": [5], "steps": 3, **OPTIONS}
    ours = Sampling(pipe, RED, [Flat()], **given).finish()
    assert ours.account.edits == {"flat": 1}
    noise = ours.run.noise((4, 16, 24), "flat")
    # pipelines scale the first noise by the largest sigma with its own 1
    factor = ours.run.levels.at(0).s / pipe.scheduler.init_noise_sigma
    plain = Sampling(pipe, RED, latents=noise * factor, **given).finish()
    torch.testing.assert_close(ours.latents, plain.latents, rtol=1e-4, atol=1e-4)
    with pytest.raises(GuidekitError, match="flat and latents or image both say"):
        Sampling(pipe, RED, [Flat()], latents=noise, **given)
    with pytest.raises(GuidekitError, match="flat begins elsewhere"):
        with guidekit.attach(pipe, [Flat()]):
            pass


def test_two_beginnings_are_refused_before_either_is_computed(pipe):
    class Sharp(Flat):
        def begin(self, run):
            raise AssertionError("it was asked")

    given = {"seeds": [5], "steps": 3, **OPTIONS}
    with pytest.raises(GuidekitError, match="sharp and flat both say how the run begins"):
        Sampling(pipe, RED, [Sharp(), Flat()], **given)


def test_a_guidance_of_scale_0_that_rejects_begins_nothing(pipe):
    class Rejects(Flat):
        def accept(self, images):
            return torch.zeros(len(images), dtype=torch.bool)

    given = {"seeds": [5], "steps": 3, **OPTIONS}
    off = Sampling(pipe, RED, [Rejects(scale=0.0)], **given).finish()
    assert torch.equal(off.latents, Sampling(pipe, RED, **given).finish().latents)


def test_levels_of_flow_follow_the_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert guidekit.Levels(scheduler).at(1).s == pytest.approx(0.75)
