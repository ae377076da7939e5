"""Paint-with-Words: its bias against the formula, and independence of the batch."""

import math
from typing import ClassVar

import pytest
import torch
from diffusers import DDIMScheduler

import tiny
from guidekit import Condition, Sampling, Segment, box_mask
from guidekit.errors import GuidekitError
from guidekit_pww import PaintWithWords

LEFT, RIGHT = box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0, 1, 1))
RED = Condition("a red circle on white", segments=(Segment("red circle", LEFT),))
BOTH = Condition(
    "a red circle and a blue square",
    segments=(Segment("red circle", LEFT, strength=0.5), Segment("blue square", RIGHT)),
)


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


class Watch(PaintWithWords):
    """Keeps the logits of each call and what is added to them."""

    seen: ClassVar[list] = []

    def edit_attention(self, step, branch, call):
        logits = call.query @ call.key.mT / math.sqrt(call.query.shape[-1])
        super().edit_attention(step, branch, call)
        self.seen.append((step, branch.name, call.site, logits, call.mask))


def watched(pipe, condition, **options):
    Watch.seen.clear()
    Sampling(pipe, condition, [Watch(**options)], seeds=[0, 1], steps=2).finish()
    return list(Watch.seen)


@pytest.mark.parametrize(
    "growth, factor",
    [
        ("log", lambda level: math.log(1 + level.sigma)),
        ("log2", lambda level: math.log(1 + level.sigma**2)),
        ("noise", lambda level: level.s),
        ("constant", lambda level: 1.0),
    ],
)
@pytest.mark.parametrize("statistic", ["max", "std"])
def test_bias_is_the_formula_at_every_site_and_each_pictures_own(pipe, growth, factor, statistic):
    seen = watched(pipe, [RED, BOTH], growth=growth, statistic=statistic)
    sites = {site for _, _, site, _, _ in seen}
    assert sites == {n for n, _ in pipe.unet.named_modules() if n.endswith("attn2")}
    for step, branch, _, logits, bias in seen:
        assert branch == "cond"
        amount = {"max": logits.flatten(1).amax(1), "std": logits.flatten(1).std(1, correction=0)}[
            statistic
        ]
        expected = torch.zeros(2, logits.shape[2], 77)
        side = math.isqrt(logits.shape[2])
        pixels = torch.arange(logits.shape[2])
        left, right = pixels % side < side // 2, pixels % side >= side // 2
        # Columns: start, a, red, circle, on | and a, blue, square.
        expected[0][left.nonzero(), torch.tensor([2, 3])] = 1
        expected[1][left.nonzero(), torch.tensor([2, 3])] = 0.5
        expected[1][right.nonzero(), torch.tensor([6, 7])] = 1
        expected *= 0.4 * factor(step.level) * amount[:, None, None]
        torch.testing.assert_close(bias, expected[:, None], rtol=1e-4, atol=1e-6)


def test_a_picture_does_not_depend_on_its_batch(pipe):
    together = Sampling(pipe, [BOTH, RED], [PaintWithWords()], seeds=[4, 5], steps=3).finish()
    for i, condition in enumerate([BOTH, RED]):
        alone = Sampling(pipe, condition, [PaintWithWords()], seeds=[4 + i], steps=3).finish()
        assert (alone.images[0] - together.images[i]).abs().max() < 1e-4


def test_the_null_branch_is_left_alone(pipe):
    plain = next(iter(Sampling(pipe, RED, steps=2)))
    painted = next(iter(Sampling(pipe, RED, [PaintWithWords(scale=2.0)], steps=2)))
    torch.testing.assert_close(painted.evals["null"].out, plain.evals["null"].out)
    assert (painted.cond.out - plain.cond.out).abs().max() > 1e-3


def test_more_scale_gives_the_phrase_more_attention_in_its_mask(pipe):
    from guidekit import Guidance

    class Read(Guidance):
        def prepare(self, run):
            weights = torch.zeros(1, 77, 1)
            weights[:, 2:4] = 1
            self.read = run.attention_read(self, weights, run.sites())

    inside = []
    for scale in (0.0, 1.0, 5.0):
        step = next(iter(Sampling(pipe, RED, [PaintWithWords(scale=scale), Read()], steps=2)))
        maps = step.cond.attention(step.run.guidances[-1].read)
        inside.append(sum(m[..., : m.shape[-1] // 2].mean() for m in maps.values()))
    assert inside[0] < inside[1] < inside[2]


def test_infinite_sigma_takes_the_next_level(pipe):
    scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    step = next(iter(Sampling(pipe, RED, [PaintWithWords()], steps=4, scheduler=scheduler)))
    assert math.isinf(step.level.sigma)
    assert torch.isfinite(step.prediction).all()


def test_chosen_sites_only(pipe):
    seen = watched(pipe, RED, sites="mid_block*attn2")
    assert {site for _, _, site, _, _ in seen} == {
        "mid_block.attentions.0.transformer_blocks.0.attn2"
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sites": "*.attn1"}, "read no text"),
        ({"sites": "nothing"}, "matches no attention site"),
    ],
)
def test_sites_that_do_not_exist_raise(pipe, options, message):
    with pytest.raises(GuidekitError, match=message):
        Sampling(pipe, RED, [PaintWithWords(**options)])


def test_wrong_values_raise(pipe):
    with pytest.raises(GuidekitError, match="growth must be one of"):
        PaintWithWords(growth="cosine")
    with pytest.raises(GuidekitError, match="statistic must be one of"):
        PaintWithWords(statistic="mean")
    with pytest.raises(GuidekitError, match="needs segments"):
        Sampling(pipe, Condition("a red circle"), [PaintWithWords()])


def test_every_call_is_in_the_account(pipe):
    sampling = Sampling(pipe, RED, [PaintWithWords()], steps=2).finish()
    assert sampling.account.edits == {"pww": 2}  # steps
