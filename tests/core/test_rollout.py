"""The differentiable rollout: the sampler's own latents; finite differences through all steps."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import tiny
from guidekit import Condition, Guidance, Sampling
from guidekit.testing.miniatures import sd3_pipeline

RED = Condition("a red circle")


class Rolled(Guidance):
    """Rolls the first z out, and shifts it in one direction."""

    def begin(self, run):
        self.found = run.rollout(run.first)


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, None])
def test_it_leads_where_the_sampler_does(cls):
    pipe = tiny.sd_pipeline() if cls else sd3_pipeline()
    scheduler = cls.from_config(pipe.scheduler.config) if cls else pipe.scheduler
    with torch.no_grad(), pytest.warns(UserWarning, match="rolled never acted"):
        drawn = Sampling(
            pipe, RED, [Rolled()], seeds=[5, 6], steps=3, cfg=5.0, scheduler=scheduler
        ).finish()
    torch.testing.assert_close(drawn.guidances[0].found, drawn.latents, rtol=1e-3, atol=1e-4)


def test_its_gradient_is_that_of_finite_differences():
    pipe = tiny.sd_pipeline().to(torch.float64)
    run = Sampling(pipe, RED, [Rolled()], seeds=[5], steps=2, cfg=5.0).run
    z, direction = (run.noise(run.latent_shape, tag).double() for tag in ("z", "direction"))
    z.requires_grad_()
    value = lambda x: run.rollout(x).square().mean()  # noqa: E731
    (grad,) = torch.autograd.grad(value(z), z)
    with torch.no_grad():
        ends = [value(z + sign * 1e-5 * direction) for sign in (1, -1)]
    numeric = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-5, atol=1e-9)
