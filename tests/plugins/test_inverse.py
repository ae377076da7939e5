"""Inverse problems where the truth is known: a Gaussian prior, linear operators, many solvers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import exact
from guidekit import Condition, Sampling
from guidekit.errors import GuidekitError
from guidekit.toolbox import Downsampling, Grey, Inpainting, as_operator
from guidekit_ddnm import Ddnm
from guidekit_dps import Dps
from guidekit_lgd import Lgd
from guidekit_pigdm import Pigdm
from guidekit_tfg import TrainingFree

SCHEDULERS = [
    DDPMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
]
NOISE = 0.25  # as much as the prior's own, of a mean over 16 pixels
A = Downsampling(4)
Y = A.forward(exact.centres()[None])[0] + 0.5


def drawn(guidance, cls=DDIMScheduler, y=Y, steps=40, images=100, **options):
    """Latents of a run on the exact model, the guidance's measurement being y."""
    flow = cls is FlowMatchEulerDiscreteScheduler
    pipe = exact.pipeline(exact.Gaussian, flow)
    own = {"clip_sample": False} if cls in (DDPMScheduler, DDIMScheduler) else {}
    scheduler = cls() if flow else cls.from_config(pipe.scheduler.config, **own)
    condition = Condition(targets={guidance.name: y} if guidance else {})
    given = {"seeds": range(images), "steps": steps, "scheduler": scheduler, **options}
    return Sampling(pipe, condition, [guidance] if guidance else [], **given).finish().latents


def moments(latents):
    """Of what was measured: the mean's distance from the prior's, and the variance."""
    found = A.forward(latents) - A.forward(exact.centres()[None])
    return float(found.mean()), float(found.var(0).mean())


def unmeasured(latents):
    """What the operator does not see of them."""
    return latents - A.pinv(A.forward(latents))


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_pigdm_is_the_posterior(cls):
    """Prior N(m, 1): a mean over 16 pixels has variance 1/16, and y the same noise again."""
    # DDPM's own noise is that of small steps.
    latents = drawn(
        Pigdm(noise=NOISE, weight="score"), cls, steps=120 if cls is DDPMScheduler else 40
    )
    mean, var = moments(latents)
    assert mean == pytest.approx(0.25, abs=0.02)
    assert var == pytest.approx(1 / 32, rel=0.2)
    rest = unmeasured(latents)  # what is not measured stays the prior's
    apart = rest.mean(0) - unmeasured(exact.centres()[None])[0]
    assert float(apart.square().mean()) < 2 * 15 / 16 / len(latents)
    assert float(rest.var(0).mean()) == pytest.approx(15 / 16, rel=0.1)


def test_dps_is_not_the_posterior():
    """No step has both: the one that leads to the mean leaves too little variance."""
    mean, var = moments(drawn(Dps(scale=0.95)))
    assert mean == pytest.approx(0.25, abs=0.03)
    assert var < 0.75 / 32
    mean, var = moments(drawn(Dps(scale=2.0)))
    assert mean > 0.4
    assert var < 0.1 / 32


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_ddnm_is_exact_without_noise(cls):
    """The measurement is met, and what was not measured is that of the unguided run."""
    ours, plain = (drawn(g, cls, steps=12, images=3) for g in (Ddnm(), None))
    torch.testing.assert_close(A.forward(ours), Y.expand(3, -1, -1, -1), rtol=0, atol=1e-4)
    torch.testing.assert_close(unmeasured(ours), unmeasured(plain), rtol=0, atol=1e-4)


def test_ddnm_travels():
    found = drawn(Ddnm(travel=2, times=2), steps=4, images=2)
    torch.testing.assert_close(A.forward(found), Y.expand(2, -1, -1, -1), rtol=0, atol=1e-4)
    assert not torch.equal(found, drawn(Ddnm(), steps=4, images=2))
    pipe, condition = exact.pipeline(exact.Gaussian), Condition(targets={"ddnm": Y})
    run = Sampling(pipe, condition, [Ddnm(travel=2, times=2)], steps=4, seeds=[5])
    assert [(s.index, s.repeat) for s in run][:4] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_tfgs_two_gradients_are_one_here(cls):
    """The denoiser's Jacobian is a, in units of its input: rho through it does what mu does."""
    given = {"cls": cls, "steps": 8, "images": 2}
    through, beside = (
        drawn(TrainingFree(rho=rho, mu=mu, inner=1, sigma=0.0), **given)
        for rho, mu in ((0.3, 0.0), (0.0, 0.3))
    )
    torch.testing.assert_close(through, beside, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(through, drawn(None, **given), atol=0.05)


def test_lgd_is_the_likelihood_of_a_gaussian():
    """With many samples: y is N(A x0, r^2 / 64 + noise^2) for a mean over 64 pixels."""
    y = torch.full((3, 1, 1), 0.4)
    lgd, seen = Lgd(samples=600, noise=0.3, down=8), []
    pipe = exact.pipeline(exact.Gaussian)
    run = Sampling(pipe, Condition(targets={"lgd": y}), [lgd], seeds=[5], steps=2)
    own = run.guidances[0]
    own.energy = lambda step: _kept(seen, own, step)
    list(run)
    for value, x0, level in seen:
        var = level.s**2 / 64 + 0.3**2
        apart = Downsampling(8).forward(x0) - y
        exact_value = (apart.square().sum() / var + 3 * torch.tensor(var / 0.3**2).log()) / 2
        assert float(value) == pytest.approx(float(exact_value), abs=0.1)


def _kept(seen, guidance, step):
    value = Lgd.energy(guidance, step)
    seen.append((value.detach(), step.x0.detach(), step.level))
    return value


@pytest.mark.parametrize(
    "operator", [Downsampling(4), Grey(), Inpainting((torch.arange(64) % 3 > 0).view(8, 8))]
)
def test_operators(operator):
    """The adjoint is one, A A^+ is the identity on measurements, and `solve` solves."""
    rng = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 2, 3, 8, 8, generator=rng, dtype=torch.float64)
    y, image = operator.forward(x), operator.forward(other)
    rows = [(y * image).flatten(1).sum(1), (x * operator.adjoint(image)).flatten(1).sum(1)]
    torch.testing.assert_close(*rows)
    torch.testing.assert_close(operator.forward(operator.pinv(y)), y)
    for ridge in (0.0, 0.3):
        solved = operator.solve(y, ridge)
        torch.testing.assert_close(operator.forward(operator.adjoint(solved)) + ridge * solved, y)
        general = super(type(operator), operator).solve(y, ridge)
        torch.testing.assert_close(general, solved)


def test_deepinvs_physics_are_operators():
    """Its blur by an object or an import path; A^+ is its own, `solve` by its A and A^T."""
    physics = pytest.importorskip("deepinv.physics", reason="needs guidekit[inverse]")
    blur = physics.BlurFFT(img_size=(3, 8, 8), filter=torch.ones(1, 1, 3, 3) / 9)
    operator = as_operator(blur, (8, 8), "pigdm.operator")
    y = blur.A(exact.centres()[None] + 0.5)[0]
    solved = operator.solve(y[None], 0.3)
    torch.testing.assert_close(operator.forward(operator.adjoint(solved)) + 0.3 * solved, y[None])
    found = drawn(Pigdm(noise=0.05, weight="score", operator=blur), y=y, images=4, steps=20)
    apart = operator.forward(found) - y
    plain = operator.forward(drawn(None, images=4, steps=20)) - y
    assert apart.square().mean() < 0.2 * plain.square().mean()
    torch.testing.assert_close(
        found,
        drawn(
            Pigdm(noise=0.05, weight="score", operator=lambda size: blur), y=y, images=4, steps=20
        ),
    )


def test_what_is_no_operator_is_refused():
    with pytest.raises(GuidekitError, match="pigdm.operator is a object; it must be a guidekit"):
        drawn(Pigdm(operator=object()), images=1)
