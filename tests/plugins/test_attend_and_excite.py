"""Attend-and-Excite against its formula on maps that diffusers' own attention class computes."""

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

import tiny
from guidekit import Condition, Sampling, Segment, box_mask
from guidekit.errors import GuidekitError
from guidekit_attend_and_excite import AttendAndExcite

CONDITION = Condition("a red circle", segments=(Segment("circle", box_mask((0, 0, 1, 1))),))


class Kept:
    """A processor that keeps the probabilities of cross-attention."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(x) for x in (attn.to_q(states), attn.to_k(text), attn.to_v(text))
        )
        probabilities = attn.get_attention_scores(q, k)
        if encoder_hidden_states is not None:
            self.kept.append(probabilities)
        out = attn.batch_to_head_dim(probabilities @ v)
        return attn.to_out[0](out)


def loss(pipe, z, timestep, text, column):
    kept = []
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Kept(kept))
    try:
        pipe.unet(z, timestep, text)
    finally:
        pipe.unet.set_attn_processor(before)
    fine = [p for p in kept if p.shape[1] == 64]  # 8x8, the grid nearest to a quarter of 16
    maps = torch.cat(fine).mean(0).view(8, 8, -1)
    words = (100 * maps[..., 1:-1]).softmax(-1)[..., column - 1]
    # torchvision's padding is reflection, as the paper's code has it
    return 1 - gaussian_blur(words[None, None], 3, 0.5).max()


def test_a_move_is_the_papers():
    pipe = tiny.sd_pipeline()
    guidance = AttendAndExcite(scale=5.0, limit=0, stop=0.4)
    sampling = Sampling(pipe, CONDITION, [guidance], seeds=[5], steps=3, cfg=5.0)
    step = next(iter(sampling))
    z = step.carried.clone().requires_grad_()
    text = sampling.run.text([CONDITION.prompt]).states
    value = loss(pipe, z, step.timestep, text, column=3)
    (grad,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(step.z, step.carried - 5.0 * grad, rtol=1e-4, atol=1e-5)
    assert grad.abs().max() > 1e-5
    (row,) = sampling.account.rows
    assert row["energy"] == pytest.approx([float(value)], rel=1e-4)
    assert row["moves"] == [1]


def test_at_the_chosen_steps_it_moves_until_there_is_enough_attention():
    pipe = tiny.sd_pipeline()
    options = {"seeds": [5], "steps": 3, "cfg": 5.0}
    (row,) = (
        Sampling(pipe, CONDITION, [AttendAndExcite(at=(0.0,), until=(0.0,), stop=0.3)], **options)
        .finish()
        .account.rows
    )
    assert row["moves"] == [1]  # it is there at once, and Algorithm 1 moves once more
    (row,) = (
        Sampling(
            pipe,
            CONDITION,
            [AttendAndExcite(at=(0.0,), until=(1.0,), limit=2, stop=0.3)],
            **options,
        )
        .finish()
        .account.rows
    )
    assert row["moves"] == [3]
    assert row["refined"] < row["energy"]


@pytest.mark.full
def test_words_stand_for_segments():
    pipe = tiny.sd_pipeline()
    options = {"seeds": [5], "steps": 2, "cfg": 5.0}
    words = Sampling(pipe, "a red circle", [AttendAndExcite(words=("circle",))], **options)
    segments = Sampling(pipe, CONDITION, [AttendAndExcite()], **options)
    assert torch.equal(words.finish().latents, segments.finish().latents)
    with pytest.raises(GuidekitError, match="resolution 5: the sites have 8, 16"):
        Sampling(pipe, CONDITION, [AttendAndExcite(resolution=5)], **options)


def test_a_token_of_two_phrases_counts_once_and_strengths_do_not_change_the_demand():
    pipe, whole = tiny.sd_pipeline(), box_mask((0, 0, 1, 1))

    def first_rows(*segments, **options):
        words = Condition("a red circle", segments=segments)
        guidance = AttendAndExcite(**options)
        run = Sampling(pipe, words, [guidance], seeds=[0], steps=2)
        next(iter(run))
        return run.run.account.rows[0]

    once = first_rows(Segment("circle", whole))
    twice = first_rows(Segment("circle", whole), Segment("circle", whole, occurrence=1))
    assert once["energy"] == twice["energy"]
    met = {"at": (0.0,), "until": (0.0,), "limit": 5}  # every token has some attention
    for strength in (0.5, 1.0, 2.0):
        row = first_rows(Segment("circle", whole, strength), **met)
        assert row["moves"] == [1]  # the one after the demand is met
