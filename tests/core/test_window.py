"""Windows in noise levels beside fractions of the steps."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import guidekit
import tiny
from guidekit import Condition, Guidance, Sampling
from guidekit.errors import GuidekitError
from guidekit.registry import Registry
from guidekit.testing.miniatures import sd3_pipeline
from guidekit_cfg import ClassifierFree

RED = Condition("a red circle")


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@dataclass(kw_only=True)
class Dim(Guidance):
    """Notes the steps at which it acts."""

    def prepare(self, run):
        self.seen = []

    def active(self, frac, level):
        return super().active(frac, level)

    def edit_prediction(self, step, out):
        self.seen.append(step.index)
        return 0.9 * out


def drawn(pipe, guidance, **options):
    return Sampling(pipe, RED, [guidance], seeds=[5], steps=6, cfg=5.0, **options).finish()


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_levels_above_stop_up_to_start(pipe, cls):
    scheduler = cls.from_config(pipe.scheduler.config)
    sigmas = [
        Sampling(pipe, RED, steps=6, scheduler=scheduler).run.levels.at(k).sigma for k in range(6)
    ]
    assert sigmas == sorted(sigmas, reverse=True)
    found = drawn(pipe, Dim(sigma_start=sigmas[1], sigma_stop=sigmas[4]), scheduler=scheduler)
    assert found.guidances[0].seen == [1, 2, 3]
    other = drawn(pipe, Dim(start=1 / 6 - 1e-9, stop=4 / 6 - 1e-9), scheduler=scheduler)
    assert torch.equal(found.latents, other.latents)
    both = drawn(pipe, Dim(start=0.3, sigma_stop=sigmas[3]), scheduler=scheduler)
    assert both.guidances[0].seen == [2]


def test_noise_alone_is_above_every_level():
    flow = sd3_pipeline()
    assert drawn(flow, Dim(sigma_start=1e9)).guidances[0].seen == [1, 2, 3, 4, 5]
    assert drawn(flow, Dim(sigma_stop=0.0)).guidances[0].seen == [0, 1, 2, 3, 4, 5]


def test_the_interval_of_classifier_free_guidance(pipe):
    """Kynkaanniemi et al. 2024: no null call outside of it."""
    low, high = (Sampling(pipe, RED, steps=6).run.levels.at(k).sigma for k in (4, 2))
    sampling = Sampling(
        pipe, RED, [ClassifierFree(sigma_start=high, sigma_stop=low)], steps=6, cfg=5.0
    )
    assert [len(step.evals) for step in sampling] == [1, 1, 2, 2, 1, 1]


def test_in_a_pipeline(pipe):
    low = Sampling(pipe, RED, steps=6).run.levels.at(3).sigma
    with guidekit.attach(pipe, [Dim(sigma_stop=low)]) as attached:
        pipe(RED.prompt, num_inference_steps=6, output_type="latent")
    assert attached.account.edits == {"dim": 3}


def test_it_is_typed_the_same_from_everywhere():
    for value in (5.42, "5.42", 5):
        made = Registry().make_guidance("zest", {"sigma_start": value, "sigma_stop": "0.28"})
        assert made.sigma_start == float(value)
        assert made.sigma_stop == 0.28
    assert made.window == "0 to 0.5, sigma 5 to 0.28"
    assert Dim().window == "0 to 1"
    for wrong in ({"sigma_start": 0.2, "sigma_stop": 5}, {"sigma_stop": -1}, {"sigma_start": 0}):
        with pytest.raises(GuidekitError, match="dim: sigma_start and sigma_stop are noise levels"):
            Dim(**wrong)
    with pytest.raises(GuidekitError, match="dim.sigma_stop must be a number, not 'low'"):
        Dim(sigma_stop="low")


def test_a_window_without_a_step_is_said(pipe):
    with pytest.warns(UserWarning, match="dim never acted: .* 0 to 1, sigma 0.002 to 0.001; check"):
        drawn(pipe, Dim(sigma_start=0.002, sigma_stop=0.001))
