"""Schedulers by every name that people write, with options, and refusals that name the nearest."""

import diffusers
import pytest
import torch

from guidekit import Condition, Sampling
from guidekit.backbones.loading import make_scheduler
from guidekit.backbones.schedulers import (
    SCHEDULERS,
    STARTS_FROM_Z,
    other_scheduler,
    parse_scheduler,
    scheduler_name,
)
from guidekit.errors import GuidekitError
from guidekit.testing.miniatures import ddpm_pipeline, sd3_pipeline, sd_pipeline


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("DPM++", "dpm++"),
        ("dpmpp", "dpm++"),
        ("dpm++2m", "dpm++"),
        ("DPM++ 2M Karras", "dpm++:karras"),
        ("DPMSolverMultistepScheduler", "dpm++"),
        ("dpmpp_2s", "dpm++2s"),
        ("euler_a", "euler-a"),
        ("Euler a", "euler-a"),
        ("EulerAncestral", "euler-a"),
        ("EulerAncestralDiscreteScheduler", "euler-a"),
        ("k_euler", "euler"),
        ("FlowMatchEuler", "flow-euler"),
        ("LCM", "lcm"),
        ("UniPC:Karras:trailing", "unipc:karras:trailing"),
        ("DDIM trailing", "ddim:trailing"),
    ],
)
def test_spellings(text, name):
    assert scheduler_name(text) == name
    assert scheduler_name(name) == name


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_short_name_and_class_name_leads_to_itself(name):
    assert parse_scheduler(name) == (name, ())
    assert parse_scheduler(SCHEDULERS[name]) == (name, ())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("eulr", r"no scheduler 'eulr' \(the nearest is euler\); there are ddim, "),
        ("dmp++", r"nearest is dpm\+\+"),
        ("magic", "no scheduler 'magic'; there are ddim, "),
        ("", "no scheduler ''; there are"),
        ("euler:kerras", "no option 'kerras'; there are karras, exponential"),
        ("euler:karras:beta", "give one of karras, exponential, beta"),
        ("karras", "no scheduler 'karras'"),
    ],
)
def test_wrong_names(text, match):
    with pytest.raises(GuidekitError, match=match):
        parse_scheduler(text)


def test_options_reach_the_scheduler():
    pipe = sd_pipeline()
    ours = make_scheduler(pipe, "dpm++:karras:trailing")
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=True, timestep_spacing="trailing"
    )
    ours.set_timesteps(7)
    theirs.set_timesteps(7)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert not torch.equal(make_scheduler(pipe, "dpm++").sigmas, ours.sigmas)


def test_an_option_replaces_that_of_the_pipeline():
    pipe = sd_pipeline()
    pipe.scheduler = make_scheduler(pipe, "euler:exponential")
    config = make_scheduler(pipe, "euler:karras").config
    assert config.use_karras_sigmas
    assert not config.use_exponential_sigmas


def test_an_option_that_the_scheduler_lacks():
    with pytest.raises(GuidekitError, match="DDIMScheduler has no karras"):
        make_scheduler(sd_pipeline(), "ddim:karras")


def test_lcm_is_the_bare_pipeline():
    pipe = sd_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(pipe, "lcm")
    draws = torch.Generator().manual_seed(3)
    theirs = pipe("a red", num_inference_steps=4, generator=draws, output_type="pt").images
    ours = Sampling(pipe, Condition("a red"), seeds=[3], steps=4, cfg=7.5).finish().images
    assert torch.equal(ours, theirs)


def test_more_steps_than_the_scheduler_makes():
    pipe = sd_pipeline()
    with pytest.raises(GuidekitError, match="LCMScheduler cannot make 51 steps: "):
        Sampling(pipe, Condition("a"), steps=51, scheduler=make_scheduler(pipe, "lcm"))


def test_a_first_timestep_that_the_model_does_not_have():
    pipe = ddpm_pipeline()
    scheduler = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    with pytest.raises(GuidekitError, match="begins at timestep 1000, but the model has 0 to 999"):
        Sampling(pipe, Condition(), steps=1000, scheduler=scheduler)
    assert len(Sampling(pipe, Condition(), steps=999, scheduler=scheduler).run.scheduler.timesteps)


def test_a_message_names_schedulers_of_the_models_kind():
    flow, other = sd3_pipeline().scheduler, sd_pipeline().scheduler
    assert other_scheduler(flow, STARTS_FROM_Z) == "use --scheduler deis, dpm++, flow-euler"
    assert other_scheduler(other, STARTS_FROM_Z).startswith("use --scheduler ddim, ddpm")
    assert other_scheduler(flow, ["ddim"]) == "no scheduler of this model does"
