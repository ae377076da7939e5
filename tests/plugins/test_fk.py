"""Feynman-Kac steering: exp(scale * reward) tilts a known law; one particle is no steering."""

import json

import pytest
import torch

import exact
import tiny
from guidekit import Condition, Sampling
from guidekit.backbones.loading import make_scheduler
from guidekit.backbones.schedulers import schedulers_for
from guidekit.errors import GuidekitError
from guidekit.testing.miniatures import sd3_pipeline
from guidekit_fk import NOISY, FeynmanKac

RED = Condition("a red circle")


def first_pixel(images):
    return images[:, 0, 0, 0]


def latents(*guidances, particles=1, images=512):
    given = {"seeds": range(images), "steps": 25, "particles": particles}
    with torch.no_grad():
        return Sampling(exact.pipeline(), Condition(), guidances, **given).finish().latents


@pytest.fixture(scope="module")
def truth():
    """The mean of a pixel under exp(2 x) times the law of the unguided run; pixels are apart.

    The exact posterior of 25 steps is a little narrower than the mixture, whose own mean is 0.46.
    """
    pixels = latents().flatten()
    weights = (2 * pixels).exp()
    return float((pixels * weights).sum() / weights.sum())


@pytest.mark.parametrize("options", [{}, {"potential": "diff"}, {"potential": "sum", "ess": 0.5}])
def test_many_particles_follow_the_tilted_law(truth, options):
    found = latents(FeynmanKac(reward=first_pixel, **options), particles=64, images=1024)
    assert float(found[:, 0, 0, 0].mean()) == pytest.approx(truth, abs=0.05)
    assert float(found[:, 1].mean()) == pytest.approx(0, abs=0.05)  # pixels without reward


def test_the_law_is_met_as_particles_grow(truth):
    found = [latents(FeynmanKac(reward=first_pixel), particles=k) for k in (1, 2, 8, 64)]
    errors = [truth - float(z[:, 0, 0, 0].mean()) for z in found]
    assert errors[0] > errors[1] > errors[2] > abs(errors[3])
    assert errors[0] == pytest.approx(truth, abs=0.06)


def test_one_particle_is_the_unguided_run():
    pipe = tiny.sd_pipeline()
    given = {"seeds": [5, 6], "steps": 4, "cfg": 5.0, "eta": 1.0}
    with pytest.warns(UserWarning, match="fk never acted"):
        alone = Sampling(pipe, RED, [FeynmanKac(scale=100)], **given).finish()
    assert torch.equal(alone.images, Sampling(pipe, RED, **given).finish().images)
    assert alone.account.rows[0]["share"] == [1.0, 1.0]


@pytest.mark.parametrize("build", [tiny.sd_pipeline, sd3_pipeline])
def test_the_schedulers_that_a_note_names_add_noise(build):
    pipe, given = build(), {"seeds": [5, 6], "steps": 4, "particles": 2}
    kinds = [name for name in schedulers_for(pipe.scheduler) if name in NOISY]
    assert kinds
    for name in kinds:
        scheduler = make_scheduler(pipe, name)
        sampling = Sampling(pipe, RED, [FeynmanKac()], scheduler=scheduler, **given)
        assert not sampling.account.notes


def test_copies_need_noise_and_rewards_a_name():
    pipe = tiny.sd_pipeline()
    given = {"seeds": [5, 6], "steps": 3, "particles": 2}
    notes = Sampling(pipe, RED, [FeynmanKac()], **given).account.notes
    assert any("copies of a particle stay copies" in note for note in notes)
    assert not Sampling(pipe, RED, [FeynmanKac()], eta=1.0, **given).account.notes
    assert Sampling(pipe, RED, [FeynmanKac(reward="guidekit.bases.rewards:brightness")], **given)
    with pytest.raises(GuidekitError, match="write MODULE:NAME, brightness, contrast"):
        Sampling(pipe, RED, [FeynmanKac(reward="beauty")], **given)
    wrong = FeynmanKac(reward=lambda images: images.mean(), at=(0.0,))
    with pytest.raises(GuidekitError, match="must give one finite number per image"):
        Sampling(pipe, RED, [wrong], eta=1.0, **given).finish()


def test_a_function_is_stated_by_where_it_is(tmp_path):
    given = {"seeds": [5, 6], "steps": 3, "particles": 2, "eta": 1.0}
    fk = FeynmanKac(reward=first_pixel, at=(0.0,))
    drawn = Sampling(tiny.sd_pipeline(), RED, [fk], **given).finish()
    kept = json.loads((drawn.save(tmp_path / "run") / "run.json").read_text())
    assert kept["plugin"]["fk"]["reward"] == "test_fk:first_pixel"
    assert kept["sample"]["particles"] == 2
    assert len(kept["record"]["account"][0]["reward"]) == 2
