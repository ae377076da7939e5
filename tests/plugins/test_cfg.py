"""Classifier-free guidance: against diffusers' own rescale, and what the interval saves."""

import pytest
import torch

import tiny
from guidekit import Condition, Guidance, Sampling, Segment, box_mask
from guidekit.errors import GuidekitError
from guidekit_cfg import ClassifierFree
from guidekit_multidiffusion import MultiDiffusion

PROMPT = "a red circle"
SEGMENTS = (Segment("red circle", box_mask((0, 0, 0.5, 1))),)


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def counted(model, run):
    """Rows of the batches that the denoiser sees while `run` runs."""
    rows = []
    handle = model.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    try:
        return run(), rows
    finally:
        handle.remove()


@pytest.mark.parametrize("make", [tiny.sd_pipeline, tiny.sdxl_pipeline])
def test_rescale_is_diffusers_rescale_bit_for_bit(make):
    pipe = make()
    theirs = pipe(
        PROMPT,
        num_inference_steps=3,
        guidance_scale=5.0,
        guidance_rescale=0.7,
        generator=[torch.Generator().manual_seed(3)],
        output_type="pt",
    ).images
    condition = Condition(PROMPT)
    ours = Sampling(pipe, condition, [ClassifierFree(rescale=0.7)], seeds=[3], steps=3, cfg=5.0)
    plain = Sampling(pipe, condition, seeds=[3], steps=3, cfg=5.0).finish()
    assert torch.equal(ours.finish().images, theirs)
    assert not torch.equal(plain.images, theirs)


def test_own_scale_is_the_run_with_that_scale(pipe):
    condition = Condition(PROMPT)
    own = Sampling(pipe, condition, [ClassifierFree(cfg_scale=4.0)], steps=3, cfg=7.5).finish()
    from_none = Sampling(pipe, condition, [ClassifierFree(cfg_scale=4.0)], steps=3, cfg=1.0)
    off = Sampling(pipe, condition, [ClassifierFree(cfg_scale=1.0)], steps=3, cfg=7.5).finish()
    expected = Sampling(pipe, condition, steps=3, cfg=4.0).finish().images
    assert torch.equal(own.images, expected)
    assert torch.equal(from_none.finish().images, expected)
    assert torch.equal(off.images, Sampling(pipe, condition, steps=3, cfg=1.0).finish().images)


def test_outside_of_the_interval_the_null_branch_is_not_evaluated(pipe):
    guidance = ClassifierFree(start=0.25, stop=0.75)
    sampling = Sampling(pipe, Condition(PROMPT), [guidance], seeds=[1], steps=4, cfg=5.0)
    steps, rows = counted(pipe.unet, lambda: list(sampling))
    assert rows == [1, 2, 2, 1]
    assert [list(s.evals) for s in steps] == [
        ["cond"],
        ["null", "cond"],
        ["null", "cond"],
        ["cond"],
    ]
    assert torch.equal(steps[0].out, steps[0].cond.out)
    assert not torch.equal(steps[1].out, steps[1].cond.out)


def test_regions_named_after_it_follow_scale_interval_and_rescale(pipe):
    condition = Condition(PROMPT, segments=SEGMENTS)
    cfg = ClassifierFree(cfg_scale=3.0, rescale=1.0, stop=0.5)
    sampling = Sampling(pipe, condition, [cfg, MultiDiffusion()], steps=2, cfg=7.5)
    first, last = list(sampling)
    assert {b.name: b.weight for b in first.branches} == {
        "null": None,
        "cond": 3.0,
        "region0.null": None,
        "region0": 3.0,
    }
    assert {b.name: b.weight for b in last.branches} == {"cond": None, "region0": None}
    torch.testing.assert_close(first.groups["region0"].std(), first.evals["region0"].out.std())


def test_regions_named_before_it_follow_the_scale_too(pipe):
    condition = Condition(PROMPT, segments=SEGMENTS)
    cfg = ClassifierFree(cfg_scale=3.0, stop=0.5)
    first, last = list(Sampling(pipe, condition, [MultiDiffusion(), cfg], steps=2, cfg=7.5))
    assert [b.weight for b in first.branches if not b.null] == [3.0, 3.0]
    assert list(last.evals) == ["cond", "region0"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": 2.0}, "set cfg_scale"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
        ({"rescale": 1.5}, "rescale"),
    ],
)
def test_wrong_values_raise(options, message):
    with pytest.raises(GuidekitError, match=message):
        ClassifierFree(**options)


def test_options_that_change_nothing_raise(pipe):
    with pytest.raises(GuidekitError, match="changes nothing"):
        Sampling(pipe, Condition(PROMPT), [ClassifierFree()])
    with pytest.raises(GuidekitError, match="set cfg_scale"):
        Sampling(pipe, Condition(PROMPT), [ClassifierFree(rescale=0.5)], cfg=1.0)


def test_every_change_is_in_the_account(pipe, recwarn):
    sampling = Sampling(pipe, Condition(PROMPT), [ClassifierFree(rescale=0.5)], steps=2).finish()
    assert sampling.account.edits == {"cfg": 2}
    assert not [w for w in recwarn if "never acted" in str(w.message)]
    assert isinstance(ClassifierFree.example(), Guidance)
