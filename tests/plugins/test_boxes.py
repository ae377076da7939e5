"""BoxDiff and layout guidance against their formulas, on maps that a plain read gives."""

import pytest
import torch

import tiny
from guidekit import Condition, Sampling, Segment, box_mask
from guidekit_boxdiff import BoxDiff, highest
from guidekit_layout_guidance import LayoutGuidance

BOX = box_mask((0, 0, 0.5, 1))
CONDITION = Condition("a red circle", segments=(Segment("circle", BOX),))


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def first(pipe, guidance, steps=2):
    sampling = Sampling(pipe, CONDITION, [guidance], seeds=[5], steps=steps, cfg=5.0)
    return sampling, next(iter(sampling))


def test_an_inner_loop_of_no_steps_is_none(pipe):
    options = {"seeds": [5], "steps": 2, "cfg": 5.0}
    bare = Sampling(pipe, CONDITION, **options).finish().latents
    with pytest.warns(UserWarning, match="never acted"):
        idle = Sampling(pipe, CONDITION, [LayoutGuidance(limit=0)], **options).finish().latents
    assert torch.equal(idle, bare)


def test_a_move_of_layout_guidance_is_the_papers(pipe):
    guidance = LayoutGuidance(limit=1, scale=3.0)
    sampling, step = first(pipe, guidance)
    own = sampling.guidances[0]
    z = step.carried.clone().requires_grad_()
    with sampling.engine.opened():
        maps = own._maps(step, z)
    assert any("mid_block" in site for site in maps)
    assert any("up_blocks" in site for site in maps)
    inside = [
        (m[0, :, 0, :, : m.shape[-1] // 2].sum((1, 2)) / m[0, :, 0].sum((1, 2))).mean()
        for m in maps.values()
    ]
    energy = torch.stack([(1 - share) ** 2 for share in inside]).mean()
    (grad,) = torch.autograd.grad(energy, z)
    torch.testing.assert_close(step.z, step.carried - 3.0 * step.level.s**2 * grad)
    (row,) = sampling.account.rows
    assert row["energy"] == pytest.approx([energy.item()], rel=1e-4)
    assert row["moves"] == [1]


def test_enough_attention_inside_ends_its_loop(pipe):
    sampling, step = first(pipe, LayoutGuidance(until=1.0))
    assert torch.equal(step.z, step.carried)
    assert sampling.account.rows[0]["moves"] == [0]


def test_the_highest_values_of_a_share_of_the_pixels():
    maps = torch.arange(16.0).view(1, 4, 4)
    where = torch.zeros(1, 4, 4, dtype=torch.bool)
    where[0, 0] = where[0, 1] = where[0, 2, :2] = True  # ten pixels, 0 to 9
    assert highest(maps, where, 0.2).tolist() == [8.5]
    assert highest(maps, ~where, 1.0).tolist() == [12.5]
    assert highest(maps, where & False, 0.2).tolist() == [0.0]


def test_the_terms_of_boxdiff_on_a_map_that_fills_its_box(pipe):
    sampling, step = first(pipe, BoxDiff(limit=1))
    own = sampling.guidances[0]
    boxes = own._boxes.float()
    assert boxes[0, 0, :, :4].all()
    assert not boxes[0, 0, :, 4:].any()
    wanted = own._maps.wanted[:, :, :1, None].float()  # one map of a word is the box, others empty
    perfect = (wanted * boxes).expand(1, wanted.shape[1], 8, 8)
    for axis in (0, 1):
        assert float((own._corners(perfect, axis) * own._pairs).sum()) == 0
    # Along the height the box ends where the image does.
    apart = [float((own._corners(1 - perfect, axis) * own._pairs).sum()) for axis in (0, 1)]
    assert apart[0] > 0
    assert apart[1] == 0
    assert own._ends[0][0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    row = sampling.account.rows[-1]
    assert row["refined"] == row["energy"]
    assert row["moves"] == [1]
    assert not step.z.isnan().any()


def test_boxdiff_raises_attention_inside(pipe):
    options = {"seeds": [5], "steps": 3, "cfg": 5.0}
    guidance = BoxDiff(at=(0.0,), until=(1.0,), limit=3, stop=0.3)
    rows = Sampling(pipe, CONDITION, [guidance], **options).finish().account.rows
    assert rows[0]["moves"] == [3]
    assert rows[0]["refined"] < rows[0]["energy"]
