"""Moves: score, mean and shift of one call, with every solver and meaning of the output."""

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from guidekit.errors import GuidekitError
from guidekit.levels import Levels
from guidekit.noise import level
from solvers import (
    ALL,
    ALL_PAIRS,
    BETAS,
    CASES,
    END_AS_THEY_ARE,
    EPS,
    FLOW,
    PAIRS,
    POST_MEAN,
    POST_STD,
    V,
    law,
    make,
    same,
    walk,
)


def tiered(pairs):
    """Pairs of a solver and what its output means; solvers beyond one meaning are of `full`."""
    first = {name: pair for name, *pair in reversed(pairs)}
    return [pytest.param(n, p, marks=[] if first[n] == [p] else pytest.mark.full) for n, p in pairs]


with_all = pytest.mark.parametrize(("name", "prediction"), tiered(ALL_PAIRS))
with_names = pytest.mark.parametrize(("name", "prediction"), [(n, ALL[n][3][-1]) for n in ALL])
# PNDM adds up v of different levels: no multistep gain is that of one order.
ORDER_PAIRS = [(n, p) for n, p in PAIRS if not (n.startswith("pndm") and p == V)]


def by_score(move, grad):
    """The first step of a flow is at a = 0: there the exact gradient is 0 and is left out."""
    return move.score(grad) if move.level.a > 1e-3 else 0 * grad


def by_mean(move, grad):
    return move.mean(grad)


@pytest.mark.parametrize(("name", "prediction"), tiered(PAIRS))
def test_score_reaches_the_posterior(name, prediction):
    tol_mean, tol_std = CASES[name][4:]
    mean, std = law(name, prediction, by_score)
    assert abs(mean - POST_MEAN) < tol_mean
    assert abs(std - POST_STD) < tol_std


@pytest.mark.parametrize("name", CASES)
def test_without_score_it_is_not_the_posterior(name):
    """Or the test above would hold of anything."""
    mean, std = law(name, CASES[name][3][0])
    assert abs(mean - POST_MEAN) > 0.6
    assert abs(std - POST_STD) > 0.13


@pytest.mark.full
@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim-eta1", "euler", "euler-a", "dpm++2m"])
def test_errors_are_of_the_steps(name):
    errors = [abs(law(name, EPS, by_score, n)[1] - POST_STD) for n in (50, 400)]
    assert errors[1] < errors[0] / 4  # the last sigma, 0.03, does not shrink with the steps


@pytest.mark.full
@pytest.mark.parametrize("name", ["ddpm", "ddim-eta1", "euler-a"])
def test_mean_reaches_the_posterior(name):
    """Algorithm 1 lags at 50 steps (0.14 of 0.67: gradient at z, not at the mean) and converges."""
    errors = [abs(law(name, EPS, by_mean, n)[0] - POST_MEAN) for n in (50, 200, 1000)]
    assert errors[0] < 0.15
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3.9


@with_all
def test_shift_once_moves_the_next_z_by_delta(name, prediction):
    rng, dead = torch.Generator().manual_seed(3), 0
    for call in walk(name, prediction):
        delta = torch.randn(call.z.shape, generator=rng, dtype=call.z.dtype)
        try:
            change = call.move.shift(delta, once=True)
        except ValueError as error:
            assert "does not read" in str(error)
            dead += 1
            assert call.moved(delta).abs().max() < 1e-12
            continue
        assert (call.moved(change) - delta).abs().max() < 1e-9
    assert dead == (name in END_AS_THEY_ARE)


def test_ddim_takes_nothing_back_of_a_change():
    """Zest's scale is in units of DDIM's next z: what a step leaves there is left for good."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    scheduler.set_timesteps(50)
    levels = Levels(scheduler)
    for k in range(50):
        gains = levels.gains(k)
        assert gains.lasting * levels.next(k).a == pytest.approx(gains.out, rel=1e-4)


@pytest.mark.parametrize("name", ["ddpm", "euler", "dpm++2m", "unipc", "heun", "flow-euler"])
def test_shift_in_float32(name):
    """What is left is the rounding of z itself, 1e-7 of its size."""
    for call in walk(name, ALL[name][3][0], dtype=torch.float32):
        change = call.move.shift(torch.ones_like(call.z), once=True)
        size = max(call.z.abs().max(), call.step(call.out + change).abs().max())
        assert change.dtype == torch.float32
        assert (call.moved(change) - 1).abs().max() < 2e-6 * size


@with_names
def test_levels_leave_the_scheduler_and_the_random_numbers_alone(name, prediction):
    scheduler, kwargs = make(name, prediction, 6)
    kwargs = {**kwargs, "generator": torch.Generator().manual_seed(4)}
    before, seeds = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
    levels = Levels(scheduler, kwargs)
    for k in range(len(levels)):
        move = levels.move(k)
        assert move.noise_std >= 0
        assert move.reads_sample in (True, False)
    level(scheduler, scheduler.timesteps[0], offset=1)
    assert same(vars(scheduler), before)
    assert torch.equal(torch.get_rng_state(), seeds)
    fresh = torch.Generator().manual_seed(4)
    assert torch.equal(kwargs["generator"].get_state(), fresh.get_state())


@with_names
def test_noise_std_is_that_of_the_next_z(name, prediction):
    for call in walk(name, prediction):
        nexts = []
        for seed in (5, 6):
            torch.manual_seed(seed)
            twin = copy.deepcopy(call.scheduler)
            given = (call.out, call.t, call.z)
            nexts.append(twin.step(*given, return_dict=False, **call.kwargs)[0].double())
        found = float((nexts[0] - nexts[1]).std()) / math.sqrt(2)
        # 96 draws: a relative standard error of 0.07
        assert call.move.noise_std == pytest.approx(found, rel=0.3, abs=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "ddpm-large", "ddim-eta1", "euler-a", "dpm++2m-sde"])
def test_mean_moves_by_var_times_grad(name):
    for call in walk(name, V if name == "ddpm" else EPS):
        move, grad = call.move, torch.randn_like(call.z)
        for var in (None, 0.3, torch.rand_like(call.z)):
            change = move.mean(grad, var)
            if move.noise_std < 1e-6:
                assert move.fallback.startswith("score")
                assert torch.equal(change, move.score(grad))
                continue
            want = (move.noise_std**2 if var is None else var) * grad
            assert move.fallback is None
            assert torch.allclose(call.moved(change), want, rtol=1e-6, atol=1e-6)


def test_mean_says_when_it_falls_back():
    call = next(walk("ddim", EPS))
    move, z = call.move, call.z
    assert torch.equal(move.mean(z), move.score(z))
    assert "no noise" in move.fallback


@with_all
def test_score_changes_eps_by_s_grad(name, prediction):
    for call in walk(name, prediction):
        at, move, z, out = call.at, call.move, call.z, call.out
        grad = torch.randn_like(z)
        if at.a < 1e-3:
            with pytest.raises(GuidekitError, match="shift"):
                move.score(grad)
            continue
        bent = at.eps(out + move.score(grad), z)
        scale = (at.s * grad).abs().max() + at.eps(out, z).abs().max()
        assert (bent - (at.eps(out, z) - at.s * grad)).abs().max() < 1e-12 * scale
        moved = at.score(out + move.score(grad), z) - at.score(out, z)
        assert (moved - grad).abs().max() < 1e-11 * (1 + scale / at.s)


def first_order(call, keep):
    """Next-z movement by a unit of z at fixed eps or x0, and what a first-order solver moves."""
    at, ahead = call.at, call.levels.next(call.index)
    ones = torch.ones_like(call.z)
    if keep == "eps":
        out, want = at.out_from_eps(0 * ones, ones), ahead.a / at.a
    else:
        out = at.out_from_x0(0 * ones, ones)
        want = (ahead.s**2 - call.move.noise_std**2) ** 0.5 / at.s
    return float((call.step(out, ones) - call.step(0 * ones, 0 * ones)).mean()), want


@pytest.mark.parametrize(("name", "prediction"), tiered(ORDER_PAIRS))
def test_reads_sample_is_a_first_order_answer_to_z(name, prediction):
    """A step from z moves as a first-order one at fixed eps, or at fixed x0 (data prediction)."""
    for call in walk(name, prediction):
        keeps = ("eps", "x0") if call.at.a > 1e-3 else ("x0",)
        pairs = [first_order(call, keep) for keep in keeps]
        answers = [got == pytest.approx(want, rel=1e-3, abs=1e-3) for got, want in pairs]
        assert call.move.reads_sample == any(answers), (call.t, pairs)


def test_reads_sample_by_scheduler():
    def pattern(name):
        calls = walk(name, FLOW if "flow" in name else EPS, steps=6)
        return "".join("ny"[call.move.reads_sample] for call in calls)

    for name in ("ddpm", "ddim", "ddim-eta1", "euler", "euler-a", "lms", "dpm++2m", "deis"):
        assert pattern(name) == "yyyyyy"
    for name in ("heun", "kdpm2", "kdpm2-a", "flow-heun"):
        assert pattern(name) == "ynynynynyny"
    assert pattern("pndm") == "ynyyyyy"
    assert pattern("dpm++2s").startswith("ynyn")
    for name in ("unipc", "flow-unipc"):
        assert pattern(name) == "ynnnny"  # the last step is first-order and returns x0 itself
    assert pattern("sasolver") == "ynnnnn"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    call = next(walk("ddpm", V))
    move, grad = call.move, call.z.to(dtype)
    for change in (move.score(grad), move.shift(grad), move.mean(grad)):
        assert change.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert move.level.x0(call.out.to(dtype), grad).dtype == wide


def test_clipping_and_learned_variance_do_not_enter_the_gain():
    plain, learned = [
        DDPMScheduler(clip_sample=clip, variance_type=kind, **BETAS)
        for clip, kind in ((False, "fixed_small"), (True, "learned_range"))
    ]
    z = torch.randn(1, 3, 4, 4)
    for scheduler in (plain, learned):
        scheduler.set_timesteps(10)
    one, two = Levels(plain), Levels(learned)
    for k in range(10):
        a, b = one.move(k), two.move(k)
        assert a.noise_std == b.noise_std
        assert torch.equal(a.shift(z), b.shift(z))
    assert learned.config.clip_sample
    assert learned.variance_type == "learned_range"


def test_packed_latents():
    scheduler, _ = make("flow-euler", FLOW, 4)
    z = torch.randn(2, 16, 64)
    assert Levels(scheduler).move(0).shift(z).shape == z.shape


def test_errors_name_the_remedy():
    scheduler, _ = make("euler", EPS, 8)
    z = torch.randn(1, 3, 4, 4)
    with pytest.raises(GuidekitError, match="it knows .'generator"):
        Levels(scheduler, dict(sigma_noise=1.0))
    with pytest.raises(GuidekitError, match="calls 0 to 7, not 8"):
        Levels(scheduler).move(8)
    blind = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    blind.set_timesteps(4)
    with pytest.raises(GuidekitError, match="start one step later"):
        Levels(blind).move(0).shift(z)
    assert Levels(blind).move(1).shift(z).isfinite().all()
