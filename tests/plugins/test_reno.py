"""ReNO on a tiny model of one step."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import tiny
from guidekit import Condition, Sampling
from guidekit.bases.rewards import contrast
from guidekit_reno import Reno, _surprise

RED = Condition("a red circle")


def drawn(*guidances, steps=1, scheduler=None, seeds=(5, 6)):
    pipe = tiny.sd_pipeline()
    scheduler = scheduler and scheduler.from_config(pipe.scheduler.config)
    given = {"seeds": seeds, "steps": steps, "cfg": 1.0, "scheduler": scheduler}
    return Sampling(pipe, RED, guidances, **given).finish()


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler])
def test_the_reward_grows_and_the_best_noise_is_drawn(scheduler):
    plain = drawn(scheduler=scheduler)
    ours = drawn(Reno(iterations=4, prior=0.0, scale=100.0), scheduler=scheduler)
    rewards = torch.tensor([row["reward"] for row in ours.account.rows])
    before, after = (contrast(run.denoiser.pixels(run.latents)) for run in (plain, ours))
    torch.testing.assert_close(rewards[0], before, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(rewards.amax(0), after, rtol=1e-3, atol=1e-5)
    assert (after > before).all()


@pytest.mark.full
def test_no_iterations_are_none_and_images_do_not_meet():
    with pytest.warns(UserWarning, match="reno never acted"):
        none = drawn(Reno(iterations=0))
    assert torch.equal(none.latents, drawn().latents)
    both, alone = drawn(Reno(iterations=2), steps=2), drawn(Reno(iterations=2), steps=2, seeds=[6])
    torch.testing.assert_close(both.latents[1:], alone.latents, rtol=1e-4, atol=1e-4)


def test_the_prior_is_least_where_normal_noise_has_its_norm():
    unit = torch.randn(1, 4, 16, 16, dtype=torch.float64)
    unit = unit / unit.norm()
    radii = torch.linspace(20, 44, 241, dtype=torch.float64)
    values = torch.cat([_surprise(r * unit) for r in radii])
    assert float(radii[values.argmin()]) == pytest.approx(1023**0.5, abs=0.1)
