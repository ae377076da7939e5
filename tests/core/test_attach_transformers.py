"""The engine inside pipelines of transformers: guided, replayed bit for bit, phrases and masks."""

import itertools

import pytest
import torch

from attaching import SEGMENTS, Bright, Watch
from drawing import draw_family, transformer
from guidekit import attach
from guidekit.errors import GuidekitError
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest

FAMILIES = ["sd3", "flux", "pixart"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guidance", [Zest(stop=1.0), Bright()])
def test_transformers_are_guided(family, guidance):
    pipe = transformer(family)
    bare = draw_family(family)
    cfg = 5.0 if family == "pixart" else None
    with attach(pipe, [guidance], segments=SEGMENTS, cfg=cfg) as attached:
        guided = draw_family(family)
    rows = attached.account.rows
    assert len(rows) == 3
    assert all(norm > 0 for row in rows for norm in row["grad_norm"])
    assert torch.isfinite(guided).all()
    assert not torch.equal(guided, bare)
    assert torch.equal(draw_family(family), bare)


def test_pixarts_scale_is_asked_for_where_an_energy_reads_x0():
    with attach(transformer("pixart"), [Bright()]):
        with pytest.raises(GuidekitError, match="guidance_scale of the call as cfg"):
            draw_family("pixart")


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_calls_are_the_pipelines_own(family):
    pipe, watch = transformer(family), Watch()
    watch.kept.clear()
    with attach(pipe, [watch]):
        got = draw_family(family)
    assert torch.equal(got, draw_family(family))
    assert [(s.index, s.n) for s in watch.kept] == [(0, 3), (1, 3), (2, 3)]
    assert watch.kept[0].z.shape == (2, 4, 16, 24)
    levels = [s.level for s in watch.kept]
    assert all(a.s > b.s for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("family", FAMILIES)
def test_phrases_have_the_columns_of_every_text_encoder(family):
    with attach(transformer(family), [Zest(stop=1.0)], segments=SEGMENTS, cfg=5.0) as attached:
        draw_family(family, seeds=(5,), num_inference_steps=1 if family != "pixart" else 2)
    (read,) = [asked.read for asked in attached.run.reads.asked]
    (columns,) = read.weights.nonzero()[:, 1].unique()[None]
    # T5: a red circle </s>; CLIP begins with a token of its own, and SD3's T5 after 77 columns.
    t5 = [1, 2]
    assert columns.tolist() == ([2, 3, 78, 79] if family == "sd3" else t5)
    for maps in attached.step.cond.attention(read).values():
        assert maps.min() > 0
        assert maps.max() < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_paint_with_words_paints_in_the_mask(family):
    read_only = Zest(stop=1.0, scale=1e-9)
    guidances = [PaintWithWords(scale=500.0), read_only]  # logits of random weights are small
    with attach(transformer(family), guidances, segments=SEGMENTS, cfg=5.0) as attached:
        draw_family(family, seeds=(5,))
    (read,) = [asked.read for asked in attached.run.reads.asked]
    for maps in attached.step.cond.attention(read).values():
        inside, outside = maps.chunk(2, dim=-1)  # the mask is the left half
        assert inside.mean() > 2 * outside.mean()


def test_two_prompts_and_two_calls_a_step_are_refused():
    with attach(transformer("flux"), [Watch()]):
        with pytest.raises(GuidekitError, match="true_cfg_scale"):
            draw_family("flux", negative_prompt="blue", true_cfg_scale=2.0)
    with attach(transformer("sd3"), [Watch()]):
        with pytest.raises(GuidekitError, match="twice in one step"):
            draw_family(
                "sd3",
                skip_guidance_layers=[0],
                skip_layer_guidance_start=-1.0,
                skip_layer_guidance_stop=1.0,
            )
