"""Search over the first noise: no worse than the run's own, and the run of the noise it names."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import tiny
from guidekit import Condition, Sampling
from guidekit.bases.rewards import contrast
from guidekit.errors import GuidekitError
from guidekit_search import Search

RED = Condition("a red circle")


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def finished(pipe, *guidances, **options):
    given = {"seeds": [5, 6], "steps": 2, "cfg": 5.0, **options}
    return Sampling(pipe, RED, guidances, **given).finish()


@pytest.mark.parametrize("method", ["random", "zero-order"])
@pytest.mark.parametrize(
    "cls", [None, pytest.param(EulerDiscreteScheduler, marks=pytest.mark.full)]
)
def test_the_best_of_all_is_drawn(pipe, method, cls):
    """Steps are first-order and without noise, so rewards are those of the finished images."""
    scheduler = cls and cls.from_config(pipe.scheduler.config)
    guidance = Search(method=method, candidates=3, rounds=2)
    run, plain = (finished(pipe, *g, scheduler=scheduler) for g in ((guidance,), ()))
    rewards = torch.tensor([row["reward"] for row in run.account.rows])
    assert len(rewards) == (4 if method == "random" else 7)
    pixels = run.denoiser.pixels(run.latents)
    torch.testing.assert_close(contrast(pixels), rewards.max(0).values, rtol=1e-3, atol=1e-4)
    own = contrast(plain.denoiser.pixels(plain.latents))
    torch.testing.assert_close(own, rewards[0], rtol=1e-3, atol=1e-4)
    assert rewards.max(0).values.sum() > rewards[0].sum()


def test_wrong_ones_are_refused(pipe):
    with pytest.raises(GuidekitError, match="write MODULE:NAME, brightness, contrast"):
        finished(pipe, Search(reward="beauty"))
    with pytest.raises(GuidekitError, match="must give one finite number per image"):
        finished(pipe, Search(reward=lambda images: images.mean()))
    with pytest.raises(GuidekitError, match="candidates and rounds are at least 1"):
        Search(candidates=0)
