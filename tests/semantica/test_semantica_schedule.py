"""Semantica's schedule, loss and sampler, against closed forms."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from guidekit.errors import GuidekitError
from guidekit.levels import Levels
from guidekit.noise import level
from guidekit.semantica.schedule import (
    SemanticaScheduler,
    epsilon_loss,
    logsnr,
    min_snr,
    noised,
    shift,
)


def test_cosine_and_its_shift():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    plain = logsnr(t, 32)
    # Nearly the cosine a = cos(pi t / 2), whose ends are at infinity.
    torch.testing.assert_close(plain, -2 * torch.log(torch.tan(math.pi * t / 2)), atol=2e-2, rtol=0)
    torch.testing.assert_close(logsnr(t, 256), plain + shift(256))
    ends = logsnr(torch.tensor([0.0, 1.0], dtype=torch.float64), 32)
    torch.testing.assert_close(ends, torch.tensor([15.0, -15.0], dtype=torch.float64))


def test_the_shift_is_the_noise_of_the_small_picture():
    """The mean over blocks of 8x8 pixels has the SNR of the unshifted schedule."""
    t, blocks = torch.tensor([0.3, 0.6]), 20000
    x0 = torch.ones(2, blocks, 64)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    z, _ = noised(x0, eps, logsnr(t, 256))
    means = z.mean(-1)
    ratio = means.mean(1) ** 2 / means.var(1)
    torch.testing.assert_close(ratio.log(), logsnr(t, 32), atol=0.05, rtol=0)


def test_loss_in_epsilon_is_that_of_every_parameterisation():
    generator = torch.Generator().manual_seed(0)
    x0, eps, out = torch.randn(3, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    levels = torch.tensor([-9.0, -2.0, 0.5, 7.0], dtype=torch.float64)
    z, v = noised(x0, eps, levels)
    a, s = (torch.sigmoid(x).sqrt().view(4, 1, 1, 1) for x in (levels, -levels))
    loss = epsilon_loss(out, v, levels)
    torch.testing.assert_close(z, a * x0 + s * eps)

    def mean(x):
        return x.square().mean((1, 2, 3))

    torch.testing.assert_close(loss.double(), mean(s * z + a * out - eps), atol=1e-5, rtol=1e-4)
    # w(t) = SNR on x
    error = mean(a * z - s * out - x0) * levels.exp()
    torch.testing.assert_close(loss.double(), error, atol=1e-5, rtol=1e-4)


def exact(z, alpha_bar, mean=0.7, std=0.5):
    """The velocity that a perfect model predicts for pixels N(mean, std^2)."""
    a, s2 = alpha_bar**0.5, 1 - alpha_bar
    x0 = mean + a * std**2 / (a * a * std**2 + s2) * (z - a * mean)
    return (a * z - x0) / s2**0.5


def draw(scheduler, steps, mean=0.7, std=0.5, count=200_000):
    """Mean and std of what the sampler makes with the exact model."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1, count, 1, generator=generator)
    for t in scheduler.timesteps:
        out = exact(z, scheduler.alphas_cumprod[int(t)], mean, std)
        z = scheduler.step(out, t, z, generator=generator).prev_sample
    return float(z.mean()), float(z.std())


def predicted(scheduler, steps, std):
    """Variance of the samples in closed form: each step is affine with Gaussian noise."""
    scheduler.set_timesteps(steps)
    variance = 1.0
    bars = [*map(float, scheduler.alphas_cumprod[scheduler.timesteps].double()), 1.0]
    for i, t in enumerate(scheduler.timesteps):
        now, then = bars[i], bars[i + 1]
        keep = now**0.5 * std**2 / (now * std**2 + 1 - now)  # d E[x0 | z] / dz
        step = now / then
        gain = then**0.5 * (1 - step) / (1 - now) * keep
        gain += step**0.5 * (1 - then) / (1 - now)
        variance = gain**2 * variance + float(scheduler._get_variance(int(t)))
    return variance**0.5


def make(**options):
    return SemanticaScheduler(image_size=32, clip_sample=False, **options)


def test_weights_stop_at_the_given_ratio():
    level = torch.tensor([5.0, 1.0, 0.0, -3.0])
    snr = level.exp()
    torch.testing.assert_close(min_snr(level, 2.0), snr.clamp(max=2.0) / snr)
    assert torch.equal(min_snr(level, 0.0), torch.ones(4))


@pytest.mark.parametrize("reading", ["lineage", "literal"])
def test_samples_of_gaussian_data(reading):
    """With the exact model the samples have the data's mean, and the std of the closed form."""
    mean, std = draw(make(reading=reading), 64)
    assert mean == pytest.approx(0.7, abs=5e-3)
    assert std == pytest.approx(predicted(make(reading=reading), 64, 0.5), rel=5e-3)
    assert std == pytest.approx(0.5, rel=0.05)
    assert predicted(make(reading=reading), 1000, 0.5) == pytest.approx(0.5, rel=5e-3)


def test_variance_lies_between_its_bounds():
    small, large = make(frac=0.0), make(frac=1.0)
    lineage, literal = make(), make(reading="literal")
    for scheduler in (small, large, lineage, literal):
        scheduler.set_timesteps(256)
    ratios = []
    for t in map(int, small.timesteps[:-1]):
        low, high = small._get_variance(t).double(), large._get_variance(t).double()
        for scheduler, own in ((lineage, 0.2), (literal, 0.8)):
            expected = high**own * low ** (1 - own)
            assert float(scheduler._get_variance(t)) == pytest.approx(float(expected), rel=1e-5)
        ratios.append(float(literal._get_variance(t) / lineage._get_variance(t)) ** 0.5)
    assert max(ratios[:200]) < 1.02
    assert ratios[-1] > 1.3
    assert all(float(s._get_variance(int(s.timesteps[-1]))) == 0 for s in (lineage, literal))


def test_bounds_are_exact_for_their_data():
    """Small variance is exact for data without spread, large for white data, but for the last step.

    That one has no noise: it takes the mean of the clean images.
    """
    for steps in (8, 64):
        large = make(frac=1.0)
        white = predicted(large, steps, 1.0)
        last = float(large.alphas_cumprod[large.timesteps[-1]]) ** 0.5
        assert white == pytest.approx(last, abs=1e-4)
        assert predicted(make(frac=0.0), steps, 1e-3) == pytest.approx(1e-3, abs=1e-3)
    assert predicted(make(frac=0.0), 8, 1.0) < 0.97 * predicted(make(frac=1.0), 8, 1.0)


@pytest.mark.parametrize("frac, theirs", [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_bounds_are_those_of_ddpm(frac, theirs):
    ours = make(frac=frac)
    ddpm = DDPMScheduler(variance_type=theirs, clip_sample=False)
    ddpm.alphas_cumprod = ours.alphas_cumprod
    ddpm.set_timesteps(timesteps=list(range(999, 0, -100)))
    ours.set_timesteps(10)
    ours.timesteps = ddpm.timesteps
    for t in map(int, ours.timesteps[:-1]):
        assert ours.previous_timestep(t) == ddpm.previous_timestep(t)
        assert float(ours._get_variance(t)) == pytest.approx(float(ddpm._get_variance(t)), rel=1e-3)


def test_levels_and_moves_know_it():
    scheduler = make()
    scheduler.set_timesteps(16)
    levels = Levels(scheduler)
    for k, t in enumerate(scheduler.timesteps[:-1]):
        now = level(scheduler, t)
        assert now == levels.at(k)
        assert now.logsnr == pytest.approx(
            float(logsnr((t.double() + 1) / 1000, 32)), rel=1e-3, abs=2e-3
        )
        assert levels.move(k).noise_std == pytest.approx(
            float(scheduler._get_variance(int(t))) ** 0.5
        )
    assert levels.move(15).noise_std == 0


def test_a_reloaded_scheduler_is_the_same(tmp_path):
    scheduler = SemanticaScheduler(image_size=256, frac=0.5, reading="literal")
    scheduler.save_pretrained(tmp_path)
    again = SemanticaScheduler.from_pretrained(tmp_path)
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    assert again.config.reading == "literal"
    assert again.config.frac == 0.5
    with pytest.raises(GuidekitError, match="lineage or literal"):
        SemanticaScheduler(reading="other")
    with pytest.raises(GuidekitError, match="from 0 to 1"):
        SemanticaScheduler(frac=2.0)
