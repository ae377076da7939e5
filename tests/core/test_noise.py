"""guidekit.noise: levels of every scheduler, and what x0, eps, v and score are there."""

import copy
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from guidekit.errors import GuidekitError
from guidekit.noise import PREDICTIONS, SOURCES, Level, level
from solvers import ALL, ALL_PAIRS, BETAS, EPS, FLOW, RETURN_X0, V, make, scale, walk

# for what does not depend on the prediction type
with_names = pytest.mark.parametrize(("name", "prediction"), [(n, ALL[n][3][-1]) for n in ALL])
# churned Euler adds noise to z before it reads x0
X0_PAIRS = [(n, p) for n, p in ALL_PAIRS if ALL[n][0] in RETURN_X0 and n != "euler-churn"]


@pytest.mark.parametrize(("name", "prediction"), X0_PAIRS)
def test_x0_agrees_with_the_scheduler(name, prediction):
    for call in walk(name, prediction, dtype=torch.float32):
        at = level(call.scheduler, call.t)
        torch.manual_seed(1)
        result = copy.deepcopy(call.scheduler).step(call.out, call.t, call.z, **call.kwargs)
        want = result.pred_original_sample
        # 2e-6 of the terms that cancel in it: the scheduler's tables are fp32
        size = want.abs().max() + call.z.abs().max() / at.a if at.a else want.abs().max()
        assert (at.x0(call.out, call.z) - want).abs().max() < 2e-6 * size


@with_names
def test_model_input_is_z_over_norm(name, prediction):
    for call in walk(name, prediction):
        got = scale(copy.deepcopy(call.scheduler), call.z, call.t)
        assert torch.allclose(got, call.z / level(call.scheduler, call.t).norm, rtol=1e-6, atol=0)


@with_names
def test_the_table_of_a_run_and_the_scheduler_as_it_goes_say_the_same(name, prediction):
    scheduler, _ = make(name, prediction, 6)
    ahead = [level(scheduler, scheduler.timesteps[0], k) for k in range(len(scheduler.timesteps))]
    for call in walk(name, prediction):
        assert level(call.scheduler, call.t) == ahead[call.index] == call.at
        told = level(call.scheduler, call.t, offset=1)
        # its stride misses the timesteps of a trailing spacing of 6
        assert told == call.levels.next(call.index) or name == "ddim-zero-snr"
    if name not in ("flow-deis", "flow-sasolver"):
        assert told.s <= 0.05
        assert told.a > 0.99
    with pytest.raises(GuidekitError, match="levels 0 to"):
        level(call.scheduler, call.t, offset=2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
@pytest.mark.parametrize("x", [1e-3, 0.3, 0.9])
def test_conversions_round_trip(kind, prediction, x):
    a = {"vp": x, "ve": 1.0, "flow": x}[kind]
    s = {"vp": math.sqrt(1 - x * x), "ve": 1 / x, "flow": 1 - x}[kind]
    at = Level(a, s, kind, prediction)
    if prediction == FLOW and kind != "flow":
        return  # level() refuses this combination
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    z = a * x0 + s * eps
    out = at.out_from_x0(x0, z)
    close = dict(rtol=0, atol=1e-10 / x)
    assert torch.allclose(at.x0(out, z), x0, **close)
    assert torch.allclose(at.eps(out, z), eps, **close)
    assert torch.allclose(at.out_from_eps(eps, z), out, **close)
    assert torch.allclose(at.score(out, z), (a * x0 - z) / s**2, **close)
    v = eps - x0 if kind == "flow" else (a * eps - s * x0) / at.norm
    assert torch.allclose(at.v(out, z), v, **close)
    if (kind, prediction) in (("vp", V), ("ve", V), ("flow", FLOW)):
        assert torch.allclose(at.v(out, z), out, **close)
    assert at.sigma == s / a
    assert at.logsnr == pytest.approx(2 * math.log(a / s))


def test_the_ends_of_a_schedule():
    noise, clean = Level(0.0, 1.0, "flow", FLOW), Level(1.0, 0.0, "vp", EPS)
    assert noise.sigma == math.inf
    assert noise.logsnr == -math.inf
    assert clean.logsnr == math.inf
    z = torch.ones(1, 1, 2, 2)
    assert torch.equal(noise.x0(0.25 * z, z), 0.75 * z)
    assert torch.equal(noise.eps(z, z), z)
    assert torch.equal(noise.score(z, z), -z)
    with pytest.raises(GuidekitError, match="out_from_x0"):
        noise.out_from_eps(z, z)
    with pytest.raises(GuidekitError, match="start one step later"):
        Level(0.0, 1.0, "vp", EPS).x0(z, z)
    with pytest.raises(GuidekitError, match="one step earlier"):
        clean.score(z, z)


def test_subclasses_are_known_and_strangers_refused():
    class Mine(DDIMScheduler):
        pass

    assert level(Mine(**BETAS), 500) == level(DDIMScheduler(**BETAS), 500)
    with pytest.raises(GuidekitError, match="EDMEulerScheduler; use .*: DDPMScheduler"):
        level(EDMEulerScheduler(), 1.0)
    assert all(hasattr(diffusers, name) for name in SOURCES)


def test_errors_name_the_remedy():
    scheduler, _ = make("euler", EPS, 8)
    with pytest.raises(GuidekitError, match="set_timesteps"):
        level(scheduler, 123.4)
    with pytest.raises(GuidekitError, match="use_flow_sigmas=True"):
        level(make("dpm++2m", FLOW, 8)[0], 999)


def test_inverted_sigmas_are_refused():
    mochi = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    mochi.set_timesteps(4)
    with pytest.raises(GuidekitError, match="invert_sigmas=False"):
        level(mochi, mochi.timesteps[0])
