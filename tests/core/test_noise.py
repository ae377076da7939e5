"""guidekit.noise against closed forms: Gaussian data, where score and posterior are known.

Data x0 ~ N(MU, C^2), observation y = x0 + N(0, R^2). With the exact model every step is affine in z
and in its noise, so a run is pushed through on unit rows: row 0 with no noise at all, row 1 with a
unit of initial noise, row 2 + k with a unit of the k-th draw. Row 0 is then the mean of what the
sampler draws and the summed squares of the others its variance: exact, without sampling error.
"""

import copy
import functools
import math

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch.overrides import TorchFunctionMode

from guidekit.levels import Levels, Move
from guidekit.noise import FAMILIES, PREDICTIONS, Level, level

diffusers.utils.logging.set_verbosity_error()
# NumPy 2 about what diffusers 0.42 does in set_timesteps
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

MU, C, Y, R = 0.7, 0.5, -0.4, 0.4
POST_VAR = 1 / (1 / C**2 + 1 / R**2)
POST_MEAN, POST_STD = POST_VAR * (MU / C**2 + Y / R**2), math.sqrt(POST_VAR)

EPS, V, SAMPLE, FLOW = PREDICTIONS
VP = (EPS, V, SAMPLE)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
KARRAS = dict(use_karras_sigmas=True)
AS_FLOW = dict(use_flow_sigmas=True, flow_shift=3.0)

# name: (class, options, step keywords, prediction types it takes, mean and std error at 50 steps).
# The errors are those of the 50-step discretisation (test_errors_are_of_the_steps), rounded up by
# less than 0.0005. They do not depend on the prediction type, except in PNDM, which mixes v of
# different levels. Runs of prototypes/gaussian_posterior.py have the same values, give or take
# the error of their 40,000 samples (mean 0.003, std 0.002).
# fmt: off
CASES = {
    "ddpm": (DDPMScheduler, dict(clip_sample=False), {}, VP, 0.0002, 0.0475),
    "ddim": (DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=False), {}, VP,
             0.0010, 0.0245),
    "ddim-eta1": (DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=False), dict(eta=1.0),
                  VP, 0.0002, 0.0455),
    "pndm": (PNDMScheduler, dict(skip_prk_steps=True), {}, (EPS, V), 0.0012, 0.0125),
    "pndm-prk": (PNDMScheduler, {}, {}, (EPS, V), 0.0012, 0.0125),
    "euler": (EulerDiscreteScheduler, {}, {}, VP, 0.0010, 0.0280),
    "euler-karras": (EulerDiscreteScheduler, KARRAS, {}, VP, 0.0010, 0.0130),
    "euler-a": (EulerAncestralDiscreteScheduler, {}, {}, (EPS, V), 0.0002, 0.0480),
    "lms": (LMSDiscreteScheduler, {}, {}, VP, 0.0010, 0.0010),
    "lms-karras": (LMSDiscreteScheduler, KARRAS, {}, VP, 0.0010, 0.0005),
    "heun": (HeunDiscreteScheduler, {}, {}, VP, 0.0010, 0.0005),
    "heun-karras": (HeunDiscreteScheduler, KARRAS, {}, VP, 0.0010, 0.0010),
    "kdpm2": (KDPM2DiscreteScheduler, {}, {}, (EPS, V), 0.0010, 0.0065),
    "kdpm2-karras": (KDPM2DiscreteScheduler, KARRAS, {}, (EPS, V), 0.0010, 0.0015),
    "kdpm2-a": (KDPM2AncestralDiscreteScheduler, {}, {}, (EPS, V), 0.0002, 0.0205),
    "kdpm2-a-karras": (KDPM2AncestralDiscreteScheduler, KARRAS, {}, (EPS, V), 0.0002, 0.0010),
    "deis": (DEISMultistepScheduler, {}, {}, VP, 0.0010, 0.0085),
    "dpm++2m": (DPMSolverMultistepScheduler, {}, {}, VP, 0.0010, 0.0255),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, KARRAS, {}, VP, 0.0010, 0.0005),
    "dpm++2m-sde": (DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++"), {}, VP,
                    0.0002, 0.0240),
    "dpm++2s": (DPMSolverSinglestepScheduler, {}, {}, VP, 0.0010, 0.0305),
    "dpm++2s-karras": (DPMSolverSinglestepScheduler, KARRAS, {}, VP, 0.0010, 0.0025),
    "unipc": (UniPCMultistepScheduler, {}, {}, VP, 0.0010, 0.0255),
    "unipc-karras": (UniPCMultistepScheduler, KARRAS, {}, VP, 0.0010, 0.0010),
    "sasolver": (SASolverScheduler, {}, {}, VP, 0.0002, 0.0135),
    "flow-euler": (FlowMatchEulerDiscreteScheduler, dict(shift=3.0), {}, (FLOW,), 0.0015, 0.0260),
    "flow-heun": (FlowMatchHeunDiscreteScheduler, dict(shift=3.0), {}, (FLOW,), 0.0010, 0.0005),
    "flow-dpm++2m": (DPMSolverMultistepScheduler, AS_FLOW, {}, PREDICTIONS, 0.0015, 0.0010),
    "flow-dpm++2s": (DPMSolverSinglestepScheduler, AS_FLOW, {}, PREDICTIONS, 0.0015, 0.0140),
    "flow-unipc": (UniPCMultistepScheduler, AS_FLOW, {}, PREDICTIONS, 0.0010, 0.0015),
    "flow-deis": (DEISMultistepScheduler, AS_FLOW, {}, PREDICTIONS, 0.0005, 0.0120),
    "flow-sasolver": (SASolverScheduler, AS_FLOW, {}, PREDICTIONS, 0.0020, 0.0030),
}
# Steps that no posterior is to be expected of: few-step students, churn, and a level of a = 0.
OTHERS = {
    "ddim-zero-snr": (DDIMScheduler, dict(clip_sample=False, rescale_betas_zero_snr=True,
                                          timestep_spacing="trailing"), {}, (V, SAMPLE)),
    "ddim-eta.5": (DDIMScheduler, dict(clip_sample=False), dict(eta=0.5), (EPS,)),
    "ddpm-large": (DDPMScheduler, dict(clip_sample=False, variance_type="fixed_large"), {},
                   (EPS,)),
    "euler-churn": (EulerDiscreteScheduler, {}, dict(s_churn=5.0, s_noise=1.1), VP),
    "flow-euler-sde": (FlowMatchEulerDiscreteScheduler, dict(stochastic_sampling=True), {},
                       (FLOW,)),
    "lcm": (LCMScheduler, {}, {}, VP),
    "tcd": (TCDScheduler, {}, dict(eta=0.3), VP),
    "flow-lcm": (FlowMatchLCMScheduler, {}, {}, (FLOW,)),
    "unipc-3": (UniPCMultistepScheduler, dict(
        solver_order=3, predict_x0=False, final_sigmas_type="sigma_min"), {}, (EPS,)),
    "dpm-3": (DPMSolverMultistepScheduler, dict(solver_order=3), {}, (EPS,)),
    "dpm-3s": (DPMSolverSinglestepScheduler, dict(solver_order=3), {}, (EPS,)),
}
# fmt: on
ALL = {**{name: case[:4] for name, case in CASES.items()}, **OTHERS}
PAIRS = [(name, p) for name in CASES for p in CASES[name][3]]
ALL_PAIRS = [(name, p) for name in ALL for p in ALL[name][3]]
with_cases = pytest.mark.parametrize(("name", "prediction"), PAIRS)
with_all = pytest.mark.parametrize(("name", "prediction"), ALL_PAIRS)
# for what does not depend on the prediction type
with_names = pytest.mark.parametrize(("name", "prediction"), [(n, ALL[n][3][-1]) for n in ALL])
# Those whose step also returns its x0; churned Euler adds noise to z before it reads x0.
RETURN_X0 = (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
X0_PAIRS = [(n, p) for n, p in ALL_PAIRS if ALL[n][0] in RETURN_X0 and n != "euler-churn"]
# PNDM adds up v of different levels: no multistep gain is that of one order.
ORDER_PAIRS = [(n, p) for n, p in PAIRS if not (n.startswith("pndm") and p == V)]
# The level that these end at is the one of their last call, where the output is not read: DDIM and
# PNDM with set_alpha_to_one=False at t = 0, and flow DEIS, whose last two sigmas are the same
# (diffusers 0.42, as SASolver's, whose corrector still reads the output).
END_AS_THEY_ARE = ("ddim", "ddim-eta1", "pndm", "pndm-prk", "flow-deis")


@functools.cache  # KDPM2 takes 0.2 s to make
def prepared(name, prediction, steps):
    cls, options, _, _ = ALL[name]
    if not cls.__name__.startswith("FlowMatch"):
        options = {**BETAS, "prediction_type": prediction, **options}
    scheduler = cls(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def make(name, prediction, steps):
    return copy.deepcopy(prepared(name, prediction, steps)), ALL[name][2]


def posterior(at, z):
    """Mean and variance of x0 given z."""
    d = at.a**2 * C**2 + at.s**2
    return MU + at.a * C**2 * (z - at.a * MU) / d, C**2 * at.s**2 / d


def grad_log_y(at, z):
    """d log p(y | z) / dz, where y | z ~ N(mean of x0, var of x0 + R^2)."""
    x0, var = posterior(at, z)
    return (Y - x0) / (var + R**2) * at.a * C**2 / (at.a**2 * C**2 + at.s**2)


def scale(scheduler, z, timestep):
    return (
        scheduler.scale_model_input(z, timestep) if hasattr(scheduler, "scale_model_input") else z
    )


class UnitDraws(TorchFunctionMode):
    """The k-th random draw is one in row 2 + k and zero elsewhere."""

    def __init__(self):
        super().__init__()
        self.row = 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        self.row += 1
        noise = torch.zeros(args[0], dtype=torch.float64)
        noise[self.row] = 1
        return noise


def law(name, prediction, push=None, steps=50):
    """Mean and std of the samples of a run with the exact model and `push(move, grad)`."""
    scheduler, kwargs = make(name, prediction, steps)
    z = torch.zeros(len(scheduler.timesteps) + 2, 1, 1, 1, dtype=torch.float64)
    z[1] = float(getattr(scheduler, "init_noise_sigma", 1.0))
    with UnitDraws():
        for t in scheduler.timesteps:
            scale(scheduler, z, t)
            move = Move(scheduler, t, z, kwargs)
            out = move.level.out_from_x0(posterior(move.level, z)[0], z)
            if push:
                out = out + push(move, grad_log_y(move.level, z))
            z = scheduler.step(out, t, z, return_dict=False, **kwargs)[0]
    rows = z.flatten()
    return float(rows[0]), float((rows[1:] - rows[0]).norm())


def by_score(move, grad):
    """The first step of a flow is at a = 0: there the exact gradient is 0 and is left out."""
    return move.score(grad) if move.level.a > 1e-3 else 0 * grad


def by_mean(move, grad):
    return move.mean(grad)


def walk(name, prediction, steps=6, dtype=torch.float64):
    """A run on random tensors; yields scheduler, timestep, z, out, step keywords of each call."""
    scheduler, kwargs = make(name, prediction, steps)
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 4, 4, generator=rng, dtype=dtype)
    z = z * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        scale(scheduler, z, t)
        out = torch.randn(z.shape, generator=rng, dtype=dtype)
        yield scheduler, t, z, out, kwargs
        torch.manual_seed(1)
        z = scheduler.step(out, t, z, return_dict=False, **kwargs)[0].to(dtype)


def step(scheduler, out, t, z, kwargs):
    """The next z, from a copy of the scheduler, always with the same noise."""
    torch.manual_seed(2)
    return copy.deepcopy(scheduler).step(out, t, z, return_dict=False, **kwargs)[0].double()


def same(a, b):
    """Deep equality of scheduler attributes, bit for bit."""
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "shape"):
        return a.shape == b.shape and bool((a == b).all())
    return a is b if callable(a) else a == b


@with_cases
def test_score_reaches_the_posterior(name, prediction):
    tol_mean, tol_std = CASES[name][4:]
    mean, std = law(name, prediction, by_score)
    assert abs(mean - POST_MEAN) < tol_mean and abs(std - POST_STD) < tol_std


@pytest.mark.parametrize("name", CASES)
def test_without_score_it_is_not_the_posterior(name):
    """Or the test above would hold of anything."""
    mean, std = law(name, CASES[name][3][0])
    assert abs(mean - POST_MEAN) > 0.6 and abs(std - POST_STD) > 0.13


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim-eta1", "euler", "euler-a", "dpm++2m"])
def test_errors_are_of_the_steps(name):
    errors = [abs(law(name, EPS, by_score, n)[1] - POST_STD) for n in (50, 400)]
    assert errors[1] < errors[0] / 4  # the last sigma, 0.03, does not shrink with the steps


@pytest.mark.parametrize("name", ["ddpm", "ddim-eta1", "euler-a"])
def test_mean_reaches_the_posterior(name):
    """Algorithm 1 lags at 50 steps (0.14 of 0.67: gradient at z, not at the mean) and converges."""
    errors = [abs(law(name, EPS, by_mean, n)[0] - POST_MEAN) for n in (50, 200, 1000)]
    assert errors[0] < 0.15 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3.9


@with_all
def test_shift_moves_the_next_z_by_delta(name, prediction):
    rng, dead = torch.Generator().manual_seed(3), 0
    for scheduler, t, z, out, kwargs in walk(name, prediction):
        delta = torch.randn(z.shape, generator=rng, dtype=z.dtype)
        try:
            change = Move(scheduler, t, z, kwargs).shift(delta)
        except ValueError as error:
            assert "does not read" in str(error)
            dead += 1
            bent = step(scheduler, out + delta, t, z, kwargs)
            assert torch.allclose(bent, step(scheduler, out, t, z, kwargs), rtol=0, atol=1e-12)
            continue
        moved = step(scheduler, out + change, t, z, kwargs) - step(scheduler, out, t, z, kwargs)

        assert (moved - delta).abs().max() < 1e-9
    assert dead == (name in END_AS_THEY_ARE)


@pytest.mark.parametrize("name", ["ddpm", "euler", "dpm++2m", "unipc", "heun", "flow-euler"])
def test_shift_in_float32(name):
    """What is left is the rounding of z itself, 1e-7 of its size."""
    for scheduler, t, z, out, kwargs in walk(name, ALL[name][3][0], dtype=torch.float32):
        change = Move(scheduler, t, z, kwargs).shift(torch.ones_like(z))
        after = step(scheduler, out + change, t, z, kwargs)
        moved = after - step(scheduler, out, t, z, kwargs)
        size = max(z.abs().max(), after.abs().max())
        assert change.dtype == torch.float32 and (moved - 1).abs().max() < 2e-6 * size


@with_names
def test_move_leaves_the_scheduler_and_the_random_numbers_alone(name, prediction):
    for scheduler, t, z, _, kwargs in walk(name, prediction):
        kwargs = {**kwargs, "generator": torch.Generator().manual_seed(4)}
        before, seeds = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
        move = Move(scheduler, t, z, kwargs)
        assert move.noise_std >= 0 and move.reads_sample in (True, False)
        level(scheduler, t, offset=1)
        assert same(vars(scheduler), before)
        assert torch.equal(torch.get_rng_state(), seeds)
        fresh = torch.Generator().manual_seed(4)
        assert torch.equal(kwargs["generator"].get_state(), fresh.get_state())


@with_names
def test_noise_std_is_that_of_the_next_z(name, prediction):
    for scheduler, t, z, out, kwargs in walk(name, prediction):
        nexts = []
        for seed in (5, 6):
            torch.manual_seed(seed)
            twin = copy.deepcopy(scheduler)
            nexts.append(twin.step(out, t, z, return_dict=False, **kwargs)[0].double())
        found = float((nexts[0] - nexts[1]).std()) / math.sqrt(2)
        # 96 draws: a relative standard error of 0.07
        assert Move(scheduler, t, z, kwargs).noise_std == pytest.approx(found, rel=0.3, abs=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "ddpm-large", "ddim-eta1", "euler-a", "dpm++2m-sde"])
def test_mean_moves_by_var_times_grad(name):
    for scheduler, t, z, out, kwargs in walk(name, V if name == "ddpm" else EPS):
        move, grad = Move(scheduler, t, z, kwargs), torch.randn_like(z)
        for var in (None, 0.3, torch.rand_like(z)):
            change = move.mean(grad, var)
            if move.noise_std < 1e-6:
                assert move.fallback.startswith("score") and torch.equal(change, move.score(grad))
                continue
            moved = step(scheduler, out + change, t, z, kwargs) - step(scheduler, out, t, z, kwargs)
            want = (move.noise_std**2 if var is None else var) * grad
            assert move.fallback is None
            assert torch.allclose(moved, want, rtol=1e-6, atol=1e-6)


def test_mean_says_when_it_falls_back():
    scheduler, t, z, _, kwargs = next(walk("ddim", EPS))
    move = Move(scheduler, t, z, kwargs)
    assert torch.equal(move.mean(z), move.score(z)) and "no noise" in move.fallback


@with_all
def test_score_changes_eps_by_s_grad(name, prediction):
    for scheduler, t, z, out, kwargs in walk(name, prediction):
        move, grad = Move(scheduler, t, z, kwargs), torch.randn_like(z)
        at = move.level
        if at.a < 1e-3:
            with pytest.raises(ValueError, match="shift"):
                move.score(grad)
            continue
        bent = at.eps(out + move.score(grad), z)
        scale = (at.s * grad).abs().max() + at.eps(out, z).abs().max()
        assert (bent - (at.eps(out, z) - at.s * grad)).abs().max() < 1e-12 * scale
        moved = at.score(out + move.score(grad), z) - at.score(out, z)
        assert (moved - grad).abs().max() < 1e-11 * (1 + scale / at.s)


@pytest.mark.parametrize(("name", "prediction"), X0_PAIRS)
def test_x0_agrees_with_the_scheduler(name, prediction):
    for scheduler, t, z, out, kwargs in walk(name, prediction, dtype=torch.float32):
        at = level(scheduler, t)
        torch.manual_seed(1)
        result = copy.deepcopy(scheduler).step(out, t, z, **kwargs)
        want = result.pred_original_sample
        # 2e-6 of the terms that cancel in it: the scheduler's tables are fp32
        size = want.abs().max() + z.abs().max() / at.a if at.a else want.abs().max()
        assert (at.x0(out, z) - want).abs().max() < 2e-6 * size


@with_names
def test_model_input_is_z_over_norm(name, prediction):
    for scheduler, t, z, _, _ in walk(name, prediction):
        got = scale(copy.deepcopy(scheduler), z, t)
        assert torch.allclose(got, z / level(scheduler, t).norm, rtol=1e-6, atol=0)


@with_names
def test_offset_is_the_level_of_a_later_call(name, prediction):
    scheduler, _ = make(name, prediction, 6)
    ahead = [level(scheduler, scheduler.timesteps[0], k) for k in range(len(scheduler.timesteps))]
    told = None
    for k, (live, t, _z, _out, _kwargs) in enumerate(walk(name, prediction)):
        assert level(live, t) == ahead[k]
        assert told in (None, ahead[k])
        told = level(live, t, offset=1)
    if name not in ("flow-deis", "flow-sasolver"):
        assert told.s <= 0.05 and told.a > 0.99  # where the run ends
    with pytest.raises(ValueError, match="levels 0 to"):
        level(live, t, offset=2)


def first_order(scheduler, t, z, kwargs, keep):
    """Next-z movement by a unit of z at fixed eps or x0, and what a first-order solver moves."""
    move, ahead = Move(scheduler, t, z, kwargs), level(scheduler, t, 1)
    at = move.level
    base = step(scheduler, torch.zeros_like(z), t, torch.zeros_like(z), kwargs)
    ones = torch.ones_like(z)
    if keep == "eps":
        out, want = at.out_from_eps(0 * ones, ones), ahead.a / at.a
    else:
        out, want = at.out_from_x0(0 * ones, ones), (ahead.s**2 - move.noise_std**2) ** 0.5 / at.s
    return float((step(scheduler, out, t, ones, kwargs) - base).mean()), want


@pytest.mark.parametrize(("name", "prediction"), ORDER_PAIRS)
def test_reads_sample_is_a_first_order_answer_to_z(name, prediction):
    """A step from z moves as a first-order one at fixed eps, or at fixed x0 (data prediction)."""
    for scheduler, t, z, _, kwargs in walk(name, prediction):
        keeps = ("eps", "x0") if level(scheduler, t).a > 1e-3 else ("x0",)
        pairs = [first_order(scheduler, t, z, kwargs, keep) for keep in keeps]
        answers = [got == pytest.approx(want, rel=1e-3, abs=1e-3) for got, want in pairs]
        assert Move(scheduler, t, z, kwargs).reads_sample == any(answers), (t, pairs)


def test_reads_sample_by_scheduler():
    def pattern(name):
        return "".join(
            "ny"[Move(scheduler, t, z, kwargs).reads_sample]
            for scheduler, t, z, _, kwargs in walk(name, FLOW if "flow" in name else EPS, steps=6)
        )

    for name in ("ddpm", "ddim", "ddim-eta1", "euler", "euler-a", "lms", "dpm++2m", "deis"):
        assert pattern(name) == "yyyyyy"
    for name in ("heun", "kdpm2", "kdpm2-a", "flow-heun"):
        assert pattern(name) == "ynynynynyny"
    assert pattern("pndm") == "ynyyyyy"
    assert pattern("dpm++2s").startswith("ynyn")
    for name in ("unipc", "flow-unipc"):
        assert pattern(name) == "ynnnny"  # the last step is first-order and returns x0 itself
    assert pattern("sasolver") == "ynnnnn"


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
    assert at.sigma == s / a and at.logsnr == pytest.approx(2 * math.log(a / s))


def test_the_ends_of_a_schedule():
    noise, clean = Level(0.0, 1.0, "flow", FLOW), Level(1.0, 0.0, "vp", EPS)
    assert noise.sigma == math.inf and noise.logsnr == -math.inf and clean.logsnr == math.inf
    z = torch.ones(1, 1, 2, 2)
    assert torch.equal(noise.x0(0.25 * z, z), 0.75 * z) and torch.equal(noise.eps(z, z), z)
    assert torch.equal(noise.score(z, z), -z)
    with pytest.raises(ValueError, match="out_from_x0"):
        noise.out_from_eps(z, z)
    with pytest.raises(ValueError, match="start one step later"):
        Level(0.0, 1.0, "vp", EPS).x0(z, z)
    with pytest.raises(ValueError, match="one step earlier"):
        clean.score(z, z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    scheduler, t, z, out, kwargs = next(walk("ddpm", V))
    move, grad = Move(scheduler, t, z.to(dtype), kwargs), z.to(dtype)
    for change in (move.score(grad), move.shift(grad), move.mean(grad)):
        assert change.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert move.level.x0(out.to(dtype), grad).dtype == wide


def test_clipping_and_learned_variance_do_not_enter_the_gain():
    plain, learned = [
        DDPMScheduler(clip_sample=clip, variance_type=kind, **BETAS)
        for clip, kind in ((False, "fixed_small"), (True, "learned_range"))
    ]
    z = torch.randn(1, 3, 4, 4)
    for scheduler in (plain, learned):
        scheduler.set_timesteps(10)
    for t in plain.timesteps:
        a, b = Move(plain, t, z), Move(learned, t, z)
        assert a.noise_std == b.noise_std and torch.equal(a.shift(z), b.shift(z))
    assert learned.config.clip_sample and learned.variance_type == "learned_range"


def test_started_in_the_middle():
    """Image-to-image: pipelines pass timesteps[k:] and set_begin_index(k)."""
    for name in ("euler", "dpm++2m", "heun", "flow-euler", "unipc"):
        prediction = FLOW if "flow" in name else EPS
        whole = [level(s, t) for s, t, *_ in walk(name, prediction)]
        scheduler, _ = make(name, prediction, 6)
        scheduler.set_begin_index(4)
        assert level(scheduler, scheduler.timesteps[4]) == whole[4]
        assert scheduler.step_index is None


def test_packed_latents_and_flat_ones():
    scheduler, _ = make("flow-euler", FLOW, 4)
    z = torch.randn(2, 16, 64)
    assert Move(scheduler, scheduler.timesteps[0], z).shift(z).shape == z.shape
    with pytest.raises(ValueError, match="B, C, H, W"):
        Move(scheduler, scheduler.timesteps[0], z.flatten())


def test_subclasses_are_known_and_strangers_refused():
    class Mine(DDIMScheduler):
        pass

    assert level(Mine(**BETAS), 500) == level(DDIMScheduler(**BETAS), 500)
    with pytest.raises(ValueError, match="EDMEulerScheduler; use .*: DDPMScheduler"):
        level(EDMEulerScheduler(), 1.0)
    assert all(hasattr(diffusers, name) for name in FAMILIES)


def test_errors_name_the_remedy():
    scheduler, _ = make("euler", EPS, 8)
    z = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="set_timesteps"):
        level(scheduler, 123.4)
    with pytest.raises(ValueError, match="it knows .'generator"):
        Move(scheduler, scheduler.timesteps[0], z, dict(sigma_noise=1.0))
    with pytest.raises(ValueError, match="use_flow_sigmas=True"):
        level(make("dpm++2m", FLOW, 8)[0], 999)
    blind = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    blind.set_timesteps(4)
    with pytest.raises(ValueError, match="start one step later"):
        Move(blind, blind.timesteps[0], z).shift(z)
