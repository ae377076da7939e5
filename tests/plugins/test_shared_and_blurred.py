"""SAG is diffusers' pipeline, TPG shuffles tokens, StyleAligned leaves the first image alone."""

import pytest
import torch
from diffusers import StableDiffusionSAGPipeline

import tiny
from guidekit import Condition, Sampling
from guidekit.errors import GuidekitError
from guidekit.testing.miniatures import sd3_pipeline
from guidekit_sag import SelfAttention
from guidekit_stylealigned import StyleAligned, _styled
from guidekit_tpg import TokenPerturbation

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def run(pipe, *guidances, conditions=PROMPT, steps=2, cfg=5.0, seeds=(3,), **options):
    return Sampling(pipe, conditions, guidances, seeds=seeds, steps=steps, cfg=cfg, **options)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_sag_is_diffusers_pipeline(pipe, cfg):
    theirs = StableDiffusionSAGPipeline(
        **tiny.sd_pipeline().components, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPT,
        num_inference_steps=2,
        guidance_scale=cfg,
        sag_scale=0.75,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    ours = run(pipe, SelfAttention(), cfg=cfg).finish().images
    assert (ours - expected).abs().max() < 1e-5
    assert (ours - run(pipe, cfg=cfg).finish().images).abs().max() > 1e-4


def test_sag_blurs_only_where_attention_gathers(pipe):
    bare = next(iter(run(pipe))).prediction
    nowhere = next(iter(run(pipe, SelfAttention(threshold=1e3)))).prediction
    torch.testing.assert_close(nowhere, bare, rtol=1e-4, atol=1e-4)
    with pytest.raises(GuidekitError, match="attn2 reads text; there are"):
        run(pipe, SelfAttention(site="mid_block*attn2"))


def test_tpg_shuffles_what_enters_the_layers(pipe):
    seen = []

    class Watching(TokenPerturbation):
        def edit_block(self, step, branch, call):
            before = call.args[0]
            super().edit_block(step, branch, call)
            seen.append((before, call.args[0]))

    step = next(iter(run(pipe, Watching(), seeds=(3, 4))))
    assert seen
    for before, after in seen:
        assert not torch.equal(before, after)
        ordered = [x.flatten(0, -2) if x.ndim == 4 else x for x in (before, after)]
        for own, other in zip(*ordered, strict=True):
            assert torch.equal(own[own[:, 0].sort().indices], other[other[:, 0].sort().indices])
    outs = {name: e.out for name, e in step.evals.items()}
    expected = outs["null"] + 5.0 * (outs["cond"] - outs["null"])
    expected = expected + 3.0 * (outs["cond"] - outs["tpg"])
    torch.testing.assert_close(step.prediction, expected)


@pytest.mark.parametrize("build", [tiny.sd_pipeline, sd3_pipeline])
def test_the_first_image_is_that_without_stylealigned(build):
    pipe = build()
    prompts = [PROMPT, "a blue square", "a green circle"]
    conditions = [Condition(p, group=g) for p, g in zip(prompts, "aab", strict=True)]
    options = {"conditions": conditions, "seeds": (3, 4, 5), "cfg": 3.0}
    bare = run(pipe, **options).finish().latents
    ours = run(pipe, StyleAligned(), **options).finish().latents
    assert torch.equal(ours[0], bare[0])
    assert torch.equal(ours[2], bare[2])
    assert (ours[1] - bare[1]).abs().max() > 1e-3
    alone = run(pipe, StyleAligned(), conditions=conditions[:1], cfg=3.0).finish().latents
    assert torch.equal(alone, run(pipe, conditions=conditions[:1], cfg=3.0).finish().latents)


def test_shared_attention_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    own, first = torch.randn(2, 1, 2, 6, 4, generator=generator, dtype=torch.float64).unbind(0)
    styled = _styled(own, first, slice(0, 4))
    assert torch.equal(styled[:, :, 4:], own[:, :, 4:])
    part, style = styled[:, :, :4], first[:, :, :4]
    torch.testing.assert_close(part.mean(2), style.mean(2))
    torch.testing.assert_close(part.std(2), style.std(2), rtol=1e-3, atol=1e-4)
