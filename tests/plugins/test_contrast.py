"""Other ways of classifier-free guidance: their formulas on three schedulers, and their ends."""

import functools
from dataclasses import dataclass

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import tiny
from guidekit import Condition, Guidance, Sampling
from guidekit.errors import GuidekitError
from guidekit.testing.miniatures import sd3_pipeline
from guidekit_cfg_pp import CfgPlusPlus
from guidekit_cfg_zero import CfgZero
from guidekit_rectified_cfg_pp import RectifiedCfg
from guidekit_tcfg import TangentialDamping, shared

CASES = {"ddim": tiny.sd_pipeline, "euler": tiny.sd_pipeline, "sd3": sd3_pipeline}
RED = Condition("a red circle")
SAME = Condition("a red circle", negative="a red circle")


@functools.cache
def pipeline(build):
    return build().to(torch.float64)


def sampling(case, *guidances, condition=RED, cfg=5.0, steps=3, **options):
    pipe = pipeline(CASES[case])
    if case == "euler":
        options["scheduler"] = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return Sampling(pipe, condition, guidances, seeds=[5], steps=steps, cfg=cfg, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_cfg_pp_is_its_formula(case, strength):
    """a' x0(null + lambda (cond - null)) + s' eps_null, to 1e-5."""
    run = sampling(case, CfgPlusPlus(strength=strength))
    steps = list(run)
    after = [step.z for step in steps[1:]] + [run.latents]
    for step, z in zip(steps, after, strict=True):
        cond, null = step.cond.out, step.evals["null"].out
        x0 = step.level.x0(null + strength * (cond - null), step.z)
        expected = step.next_level.a * x0 + step.next_level.s * step.level.eps(null, step.z)
        size = float(step.z.abs().max())
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("case", CASES)
def test_cfg_pp_at_0_is_the_unconditional_run(case):
    ours = sampling(case, CfgPlusPlus(strength=0.0)).finish().latents
    plain = sampling(case, condition=Condition(""), cfg=1.0).finish().latents
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("guidance", [CfgZero(zero=0.0), TangentialDamping(), RectifiedCfg()])
@pytest.mark.parametrize("case", CASES)
def test_equal_branches_are_the_conditional_run(case, guidance):
    """With c = u there is no contrast to make anything of."""
    ours = sampling(case, guidance, condition=SAME).finish().latents
    plain = sampling(case, cfg=1.0).finish().latents
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_cfg_zero_is_its_formula_and_stands_still_on_flows():
    (step, *_) = sampling("ddim", CfgZero(zero=1.0))
    cond, null = step.cond.out.flatten(), step.evals["null"].out.flatten()
    null = null * (cond @ null) / (null @ null)
    torch.testing.assert_close(step.out.flatten(), null + 5 * (cond - null))
    first, second, third = sampling("sd3", CfgZero(zero=0.4))  # the first step of three
    torch.testing.assert_close(second.z, first.z)
    assert not torch.allclose(third.z, second.z)


def test_tcfg_projects_on_the_first_singular_vector():
    cond, null = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    found = shared(cond, null)
    for row in range(3):
        both = torch.stack([cond[row].flatten(), null[row].flatten()])
        first = torch.linalg.svd(both, full_matrices=False)[2][0]
        expected = (both[1] @ first) * first
        torch.testing.assert_close(found[row].flatten(), expected)


@dataclass(kw_only=True)
class Conditional(Guidance):
    """The conditional output in place of the combination; both branches are evaluated."""

    def combine(self, step, outs, combined):
        return outs["cond"]


@pytest.mark.parametrize("case", CASES)
def test_rectified_cfg_pp_is_its_formula(case):
    """The contrast is that of the run along the conditional prediction, one step on."""
    here, there = list(sampling(case, Conditional(), steps=2))
    (step, last) = sampling(case, RectifiedCfg(strength=3.0), steps=2)
    contrast = there.cond.out - there.evals["null"].out
    torch.testing.assert_close(step.out, here.cond.out + 3 * contrast, rtol=1e-5, atol=1e-6)
    own = last.cond.out - last.evals["null"].out
    torch.testing.assert_close(last.out, last.cond.out + 3 * own)


def test_without_a_null_they_are_refused():
    with pytest.raises(GuidekitError, match="tcfg changes classifier-free guidance, and cfg is 1"):
        sampling("ddim", TangentialDamping(), cfg=1.0)
    with pytest.raises(GuidekitError, match=r"cfg-pp.scale is 1 \(on\) or 0"):
        CfgPlusPlus(scale=2.0)
    with pytest.raises(GuidekitError, match="cfg-pp.strength lies from 0 to 1"):
        CfgPlusPlus(strength=7.5)
