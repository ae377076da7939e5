"""The table of a run: where calls lead, and that a shift is what lasts in the finished sample."""

import functools
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from guidekit.errors import NoPushError
from guidekit.levels import Levels
from guidekit.noise import level
from solvers import ALL, BETAS, CASES, EPS, FLOW, C, UnitDraws, make, posterior, scale, walk

# What a stochastic solver forgets of a displacement is the denoiser's doing; with eps held it keeps
# all of it, on average over the noise.
DETERMINISTIC = [
    "ddim",
    "euler",
    "pndm",
    "pndm-prk",
    "lms",
    "deis",
    "dpm++2m",
    "dpm++2s",
    "unipc",
    "heun",
    "kdpm2",
    "dpm++2m-karras",
    "unipc-karras",
    "flow-euler",
    "flow-heun",
]
QUICK = ("euler", "dpm++2m", "heun", "flow-euler")  # of them, in the tier `fast`


class NoDraws(UnitDraws):
    """Every random draw is zero."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs)
        self.row = -1
        return 0 * found if func is torch.randn else found


def held(at, dz):
    """The output of a denoiser that holds eps where z moves by dz."""
    if at.prediction == "sample":
        return dz / at.a
    return at.out_from_eps(0 * dz, dz) if at.a else 0 * dz


def gaussian(at, dz):
    """How the exact denoiser of Gaussian data answers to dz."""
    slope = posterior(at, 1.0)[0] - posterior(at, 0.0)[0]
    return at.out_from_x0(slope * dz, dz)


def left(name, prediction, steps, denoiser):
    """Per call with a push: the movement of the finished x0 for a shift of 1, in each row alone."""
    scheduler, kwargs = make(name, prediction, steps)
    levels = Levels(scheduler, kwargs)
    n, pushed = len(levels), []
    z = torch.zeros(n, 1, 1, 1, dtype=torch.float64)
    with NoDraws():
        for k, t in enumerate(scheduler.timesteps):
            scale(scheduler, z, t)
            out = denoiser(levels.at(k), z) if z.any() else 0 * z
            try:
                out[k] += levels.move(k).shift(torch.ones(1, 1, 1, dtype=torch.float64))
                pushed.append(k)
            except NoPushError:
                pass
            z = scheduler.step(out, t, z, return_dict=False, **kwargs)[0].double()
    return levels, {k: float(z[k]) / levels.next(n - 1).a for k in pushed}


@functools.cache
def mean_left(name):
    """The mean of what is left of a shift of 1, over three quarters of 100 steps."""
    levels, found = left(name, ALL[name][3][0], 100, gaussian)
    share = []
    for k in [k for k in found if k < 0.75 * len(levels)]:
        at = levels.next(k)
        share.append(found[k] * math.hypot(at.a * C, at.s) / C)
    return sum(share) / len(share)


@pytest.mark.parametrize("steps", [10, pytest.param(50, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ALL)
def test_a_shift_is_left_in_the_finished_sample(name, steps):
    """A denoiser that holds eps carries a displacement delta to delta / a, and no solver more."""
    levels, found = left(name, ALL[name][3][0], steps, held)
    for k, moved in found.items():
        assert moved * levels.next(k).a == pytest.approx(1.0, rel=1e-3)
    whole = [calls[-1] for calls in levels.steps]
    assert set(found) <= set(whole)
    assert len(whole) - len(found) <= 3  # where the history takes nearly all back, at the end
    assert set(whole[: 3 * len(whole) // 4]) <= set(found)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "unipc", "heun", "flow-dpm++2m", "flow-unipc"])
def test_whatever_the_output_means(name, prediction):
    if prediction not in ALL[name][3]:
        return
    levels, found = left(name, prediction, 20, held)
    for k, moved in found.items():
        assert moved * levels.next(k).a == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in DETERMINISTIC],
)
def test_a_shift_is_that_of_ddim_with_the_exact_denoiser(name):
    """Pushes over three quarters of the run, against the exact flow of Gaussian data, and DDIM's.

    With 100 steps; the solvers' own errors, DDIM's 2.4%, fall with their number.
    """

    mine, ddim = mean_left(name), mean_left("ddim")
    assert mine == pytest.approx(1.0, abs=0.06)
    assert mine == pytest.approx(ddim, rel=0.05)


def test_shift_once_is_not_what_lasts():
    """Or the tests above would hold of anything: half of PNDM's pushes is taken back."""
    levels = Levels(make("pndm", EPS, 50)[0])
    move, one = levels.move(20), torch.ones(1)
    assert float(move.shift(one, once=True) / move.shift(one)) == pytest.approx(0.45, abs=0.05)


def test_the_stages_of_a_solver_are_one_step():
    def pattern(name, steps=6):
        prediction = FLOW if name.startswith("flow") else EPS
        return [len(calls) for calls in Levels(make(name, prediction, steps)[0]).steps]

    for name in ("ddim", "euler", "dpm++2m", "unipc", "lms", "sasolver", "flow-euler"):
        assert pattern(name) == [1] * 6
    for name in ("heun", "kdpm2", "kdpm2-a", "flow-heun"):
        assert pattern(name) == [2] * 5 + [1]
    assert pattern("pndm") == [2, 1, 1, 1, 1, 1]
    assert pattern("pndm-prk") == [4, 4, 4, 1, 1, 1]
    assert pattern("dpm++2s") == [2, 2, 1, 1]
    assert pattern("dpm-3s", 9) == [3, 3, 2, 1]
    with pytest.raises(NoPushError, match="stage 1 of 2"):
        Levels(make("heun", EPS, 6)[0]).move(2).shift(torch.ones(1))


@pytest.mark.parametrize("steps", [7, 30])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("cls", [DDIMScheduler, PNDMScheduler])
def test_next_is_the_level_that_the_step_leads_to(cls, spacing, steps):
    """With a known x0 and eps: z after every call is a * x0 + s * eps of `next`."""
    more = {"clip_sample": False} if cls is DDIMScheduler else {"skip_prk_steps": True}
    scheduler = cls(**BETAS, timestep_spacing=spacing, set_alpha_to_one=False, **more)
    scheduler.set_timesteps(steps)
    levels = Levels(scheduler)
    x0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    for k, t in enumerate(scheduler.timesteps):
        at, ahead = levels.at(k), levels.next(k)
        z = scheduler.step(eps, t, at.a * x0 + at.s * eps).prev_sample
        # PNDM's second call takes its first z for one a stride above the second timestep.
        exact = spacing == "leading" or cls is DDIMScheduler or k != 1
        assert not exact or torch.allclose(z, ahead.a * x0 + ahead.s * eps, rtol=0, atol=1e-5)
        if not levels.ends_step(k):  # the second call starts from this one's z
            scheduler.cur_sample = at.a * x0 + at.s * eps


@pytest.mark.parametrize("name", CASES)
def test_next_is_at_of_the_next_call_elsewhere(name):
    levels = Levels(make(name, CASES[name][3][0], 20)[0])
    assert all(levels.next(k) == levels.at(k + 1) for k in range(len(levels) - 1))


def test_the_instance_counts_and_not_its_config_alone():
    plain, shifted = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()
    shifted.set_shift(7.0)
    rescaled = DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False)
    root = rescaled.alphas_cumprod.sqrt()
    rescaled.alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    hand_made = DPMSolverMultistepScheduler(**BETAS)
    for scheduler in (plain, shifted, rescaled, hand_made):
        scheduler.set_timesteps(8)
    hand_made.sigmas = hand_made.sigmas * 0.5
    assert Levels(shifted).at(4).s > Levels(plain).at(4).s + 0.1
    for scheduler in (shifted, rescaled, hand_made):
        levels = Levels(scheduler)
        x0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
        z = levels.at(0).a * x0 + levels.at(0).s * eps
        for k, t in enumerate(scheduler.timesteps):
            out, ahead = levels.at(k).out_from_x0(x0, z), levels.next(k)
            z = scheduler.step(out, t, z).prev_sample
            assert torch.allclose(z, ahead.a * x0 + ahead.s * eps, rtol=0, atol=2e-4)


def test_started_in_the_middle():
    """Image-to-image: pipelines pass timesteps[k:], and set_begin_index(k) where there is one."""
    for name in ("euler", "dpm++2m", "heun", "flow-euler", "unipc"):
        whole = [call.at for call in walk(name, FLOW if "flow" in name else EPS)]
        scheduler, _ = make(name, FLOW if "flow" in name else EPS, 6)
        scheduler.set_begin_index(4)
        levels = Levels(scheduler)
        assert levels.start == 4
        assert len(levels) == len(whole) - 4
        assert [levels.at(k) for k in range(len(levels))] == whole[4:]
        assert level(scheduler, scheduler.timesteps[4]) == whole[4]
        assert scheduler.step_index is None
        assert math.isfinite(levels.gains(0).lasting)
    scheduler, _ = make("ddim", EPS, 6)
    assert Levels(scheduler, start=2).at(0) == Levels(scheduler).at(2)
