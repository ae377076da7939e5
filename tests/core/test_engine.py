"""One guided step: edits that chain, branches, the account, a model that is left as it was."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler

import tiny
from guidekit import Branch, FeatureRead, Guidance, Sampling
from guidekit.errors import GuidekitError
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest
from one_step import RED, Bright, Input, predict


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def state(model):
    """Everything of a model that sampling could leave changed."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [(m.training, sorted(vars(m)), "forward" in vars(m)) for m in model.modules()],
        [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
    )


class Fails(Guidance):
    """Raises in the middle of an attention call."""

    def prepare(self, run):
        run.tap_attention(self, "*attn1")
        run.tap_blocks(self, "mid_block")

    def edit_attention(self, step, branch, call):
        raise KeyError("in the middle")


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_bit_identical(memory, failing):
    pipe = tiny.sd_pipeline()
    pipe.unet.train().requires_grad_(True)
    pipe.unet.mid_block.eval()
    pipe.unet.conv_in.requires_grad_(False)
    before = state(pipe.unet), state(pipe.vae)
    guidances = [PaintWithWords(), Zest(), Bright()] + [Fails()] * failing
    sampling = Sampling(pipe, RED, guidances, steps=1, memory=memory)
    if failing:
        with pytest.raises(KeyError, match="in the middle"):
            sampling.finish()
    else:
        sampling.finish()
    for (weights, *rest), model in zip(before, (pipe.unet, pipe.vae), strict=True):
        now, *others = state(model)
        assert others == rest
        assert all(torch.equal(now[k], v) for k, v in weights.items())
    assert all(p.grad is None for p in pipe.unet.parameters())


@dataclass(kw_only=True)
class Add(Guidance):
    """Doubles and adds at every hook, so that the order of two shows."""

    amount: float = 1.0

    def prepare(self, run):
        run.tap_blocks(self, "mid_block")

    def edit_prediction(self, step, out):
        return 2 * out + self.amount

    def edit_sample(self, step, z):
        return 2 * z + self.amount

    def edit_input(self, step, branch, x):
        return 2 * x + self.amount

    def combine(self, step, outs, combined):
        return 2 * combined + self.amount

    def edit_block(self, step, branch, call):
        return 2 * call.run() + self.amount


def test_edits_chain_in_the_order_of_the_user(pipe):
    class Watch(Guidance):
        def prepare(self, run):
            self.read = run.read(self, FeatureRead(("mid_block",)))

        def edit_input(self, step, branch, x):
            self.x = x
            return x

    def chained(x):
        return 2 * (2 * x + 1) + 10

    blocks = []
    sampling = Sampling(pipe, RED, [Add(amount=1), Add(amount=10), Watch()], steps=1, cfg=1.0)
    watch = sampling.guidances[-1]
    handle = pipe.unet.mid_block.register_forward_hook(lambda m, a, out: blocks.append(out))
    original = pipe.unet.mid_block.forward
    (step,) = list(sampling)
    handle.remove()
    torch.testing.assert_close(watch.x, chained(step.z))
    torch.testing.assert_close(step.out, chained(step.cond.out))
    torch.testing.assert_close(step.prediction, chained(step.out))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(1)
    plain = scheduler.step(step.prediction, step.timestep, step.z).prev_sample
    torch.testing.assert_close(sampling.latents, chained(plain))
    (features,) = step.cond.features(watch.read).values()
    assert torch.equal(features, blocks[0])  # read after all edits
    assert pipe.unet.mid_block.forward == original


def test_block_edits_chain_and_see_each_other(pipe):
    outputs = []

    class Block(Add):
        edit_prediction, edit_sample = Guidance.edit_prediction, Guidance.edit_sample
        edit_input, combine = Guidance.edit_input, Guidance.combine

        def edit_block(self, step, branch, call):
            before = call.run()
            outputs.append(before)
            return 2 * before + self.amount

    class Idle(Block):
        def edit_block(self, step, branch, call):
            return None

    guidances = [Block(amount=1), Block(amount=10), Idle()]
    predict(pipe, guidances, cfg=1.0)
    blocks = []
    handle = pipe.unet.up_blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: blocks.append(kwargs["hidden_states"]), with_kwargs=True
    )
    predict(pipe, guidances, cfg=1.0)
    handle.remove()
    first, second = outputs[-2:]
    torch.testing.assert_close(second, 2 * first + 1)
    torch.testing.assert_close(blocks[0], 2 * second + 10)


def test_attention_edits_add_up(pipe):
    _, once = predict(pipe, [PaintWithWords(scale=0.6, growth="constant", statistic="std")])
    halves = [PaintWithWords(scale=0.3, growth="constant", statistic="std") for _ in range(2)]
    _, twice = predict(pipe, halves)
    torch.testing.assert_close(once.prediction, twice.prediction, rtol=1e-4, atol=1e-5)


def test_branches_without_a_base_or_with_a_name_twice_raise(pipe):
    class Twice(Guidance):
        def branches(self, step, branches):
            return [*branches, Branch("cond", branches[-1].prompts, 1.0)]

    class Baseless(Guidance):
        def branches(self, step, branches):
            return [b for b in branches if not b.null]

    class NoCond(Guidance):
        def branches(self, step, branches):
            return [b for b in branches if b.null]

    with pytest.raises(GuidekitError, match="two branches are called 'cond'"):
        predict(pipe, [Twice()])
    with pytest.raises(GuidekitError, match="no base among the branches cond"):
        predict(pipe, [Baseless()])
    with pytest.raises(GuidekitError, match="zest reads the branch 'cond'"):
        predict(pipe, [Zest(), NoCond()])


def test_many_branches_are_one_result_in_several_calls(pipe, monkeypatch):
    class Many(Guidance):
        def branches(self, step, branches):
            own = step.z.roll(1, -1)
            more = [Branch(f"b{i}", branches[-1].prompts, 0.1, x=own) for i in range(5)]
            return [*branches, *more]

    expected = predict(pipe, [Many()])[1].out
    monkeypatch.setattr("guidekit.engine.evaluator.ROWS", 4)
    torch.testing.assert_close(predict(pipe, [Many()])[1].out, expected, rtol=1e-4, atol=1e-5)


def test_the_account_has_a_row_for_each_guidance_and_step(pipe):
    sampling = Sampling(pipe, RED, [Zest(), Bright(stop=0.5)], seeds=[0, 1], steps=2).finish()
    rows = sampling.account.rows
    assert [(r["plugin"], r["step"]) for r in rows] == [("zest", 0), ("bright", 0)]
    for row in rows:
        assert len(row["energy"]) == len(row["grad_norm"]) == len(row["update_ratio"]) == 2
        assert all(v > 0 for v in row["grad_norm"] + row["update_ratio"])
        assert row["seconds"] > 0
    assert sampling.account.acted("zest")
    assert not sampling.account.acted("nobody")


def test_a_guidance_that_never_acts_is_warned_of(pipe):
    class Flat(Guidance):
        def energy(self, step):
            return 0 * step.x0.flatten(1).mean(1)

    sampling = Sampling(pipe, RED, [Flat()], steps=2)
    with pytest.warns(UserWarning, match="flat never acted"):
        sampling.finish()
    assert "flat never acted" in sampling.account.notes[0]


class Far(Input):
    """Pushes by a shift at every step, also where the step does not read the output."""

    def push(self, step, grad):
        """Moves the next z against the gradient."""
        return step.move.shift(-grad)


def test_a_step_without_a_push_is_left_out_and_noted(pipe):
    # Without an offset the last step of this DDIM goes from the first level to itself.
    scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, set_alpha_to_one=False, steps_offset=0, timestep_spacing="leading"
    )
    run = Sampling(pipe, RED, [Far()], steps=4, scheduler=scheduler).finish()
    assert len(run.account.rows) == 4
    assert [r["update_ratio"][0] > 0 for r in run.account.rows] == [True, True, True, False]
    assert any("left out step 3" in note for note in run.account.notes)
