"""Regional prompts: one region of the whole prompt is no region, and regions do not hear others."""

import pytest
import torch

import tiny
from guidekit import Condition, Sampling, Segment, box_mask
from guidekit.errors import GuidekitError
from guidekit.testing.miniatures import flux_pipeline, pixart_pipeline, sd3_pipeline
from guidekit_regions import Regions

LEFT, WHOLE = box_mask((0, 0, 0.5, 1)), box_mask((0, 0, 1, 1))
BUILDS = [tiny.sd_pipeline, sd3_pipeline, flux_pipeline]
PROMPT = "a red circle"


def condition(mask, prompt):
    return Condition(PROMPT, segments=(Segment("circle", mask, prompt=prompt),))


def run(pipe, condition, *guidances, **options):
    cfg = 1.0 if type(pipe).__name__.startswith("Flux") else 3.0
    return Sampling(pipe, condition, guidances, seeds=[3], steps=2, cfg=cfg, **options)


@pytest.mark.parametrize("build", BUILDS)
def test_a_region_of_everything_is_drawn_like_its_prompt_alone(build):
    pipe = build()
    step = next(iter(run(pipe, condition(WHOLE, PROMPT), Regions(base=0.0))))
    outs = {name: e.out for name, e in step.evals.items()}
    torch.testing.assert_close(outs["regions"], outs["cond"], rtol=1e-3, atol=1e-4)
    other = next(iter(run(pipe, condition(WHOLE, "a blue square"), Regions(base=0.0))))
    assert (other.evals["regions"].out - outs["cond"]).abs().max() > 1e-3


@pytest.mark.parametrize("build", [sd3_pipeline, flux_pipeline])
def test_the_rest_does_not_hear_a_regions_prompt(build):
    pipe = build()
    found = {}
    for apart in (True, False):
        outs = [
            next(iter(run(pipe, condition(LEFT, text), Regions(apart=apart)))).evals["regions"].out
            for text in ("a blue square", "a green square")
        ]
        found[apart] = (outs[0] - outs[1]).abs()
    half = found[True].shape[-1] // 2
    assert found[True][..., :half].max() > 1e-3
    assert found[True][..., half:].max() < 1e-6
    assert found[False][..., half:].max() > 1e-6


def test_the_blend_is_the_papers():
    pipe = sd3_pipeline()
    step = next(iter(run(pipe, condition(LEFT, "a blue square"), Regions(base=0.25))))
    null, cond, own = (step.evals[name].out for name in ("null", "cond", "regions"))
    blended = 0.25 * cond + 0.75 * own
    torch.testing.assert_close(step.prediction, null + 3.0 * (blended - null))


def test_texts_with_masks_are_refused():
    with pytest.raises(GuidekitError, match="not with pixart, whose texts have masks"):
        run(pixart_pipeline(), condition(LEFT, "a blue square"), Regions())


@pytest.mark.parametrize("build", BUILDS)
def test_a_strength_is_a_factor_on_what_its_region_makes(build):
    pipe, found = build(), {}
    for strength in (0.0, 0.5, 1.0):
        segment = Segment("circle", LEFT, strength, prompt="a blue square")
        step = next(iter(run(pipe, Condition(PROMPT, segments=(segment,)), Regions(base=0.0))))
        found[strength] = step.prediction
    torch.testing.assert_close(found[0.5], (found[0.0] + found[1.0]) / 2, rtol=1e-4, atol=1e-5)
    half = found[0.0].shape[-1] // 2
    assert (found[1.0] - found[0.0])[..., :half].abs().max() > 1e-3
    assert torch.equal(found[1.0][..., half:], found[0.0][..., half:])


def test_strengths_of_overlapping_regions_are_averaged():
    pipe = tiny.sd_pipeline()

    def prediction(*strengths):
        segments = tuple(
            Segment("circle", WHOLE, strength, prompt="a blue square") for strength in strengths
        )
        return next(iter(run(pipe, Condition(PROMPT, segments=segments), Regions()))).prediction

    torch.testing.assert_close(prediction(0.3, 0.3), prediction(0.2, 0.4), rtol=1e-4, atol=1e-5)
    nothing, all_ = prediction(0.0, 0.0), prediction(1.0, 1.0)
    wanted = nothing + 0.3 * (all_ - nothing)
    torch.testing.assert_close(prediction(0.3, 0.3), wanted, rtol=1e-3, atol=1e-4)
