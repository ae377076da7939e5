"""One guided step: gradients against finite differences, graphs, backwards, chains and refusals."""

import functools
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import DDIMScheduler

import tiny
from guidekit import Branch, Condition, FeatureRead, Guidance, Sampling, Segment, box_mask
from guidekit.errors import NonFiniteError
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest

SEGMENTS = (
    Segment("red circle", box_mask((0, 0, 0.5, 1))),
    Segment("blue", box_mask((0.5, 0.5, 1, 1)), strength=0.5),
)
RED = Condition("a red circle and a blue square", segments=SEGMENTS)


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@functools.cache
def double_pipe():
    return tiny.sd_pipeline().to(torch.float64)


@dataclass(kw_only=True)
class Keep(Guidance):
    """Keeps the energy and the gradient of each step."""

    def push(self, step, grad):
        self.grad = grad
        return super().push(step, grad)


@dataclass(kw_only=True)
class Bright(Keep):
    """An energy of the combined x0."""

    def energy(self, step):
        self.value = (step.x0[:, :2] ** 2).flatten(1).mean(1)
        return self.value


@dataclass(kw_only=True)
class Pixels(Keep):
    """An energy of the decoded x0."""

    def energy(self, step):
        self.value = (step.decode(step.x0)[:, 0] ** 3).flatten(1).mean(1)
        return self.value


@dataclass(kw_only=True)
class Features(Keep):
    """An energy of features of the conditional branch."""

    graph = "features"

    def prepare(self, run):
        self.read = run.read(self, FeatureRead(("mid_block",)))

    def energy(self, step):
        (features,) = step.cond.features(self.read).values()
        self.value = (features**2).flatten(1).mean(1)
        return self.value


@dataclass(kw_only=True)
class Input(Keep):
    """An energy of z alone."""

    graph = "input"

    def energy(self, step):
        self.value = (step.z**2).flatten(1).mean(1)
        return self.value


class KeepZest(Zest):
    """Zest that keeps its energy and its gradient."""

    def energy(self, step):
        self.value = super().energy(step)
        return self.value

    def push(self, step, grad):
        self.grad = grad
        return super().push(step, grad)


def engine_at(pipe, guidances, seeds=(0, 1), cfg=4.0, steps=4, **options):
    """An engine with the first z and timestep of a run."""
    sampling = Sampling(pipe, RED, guidances, seeds=seeds, steps=steps, cfg=cfg, **options)
    z, timestep = sampling._start(), sampling.run.scheduler.timesteps[0]
    return sampling.engine, z, timestep


def predict(pipe, guidances, **options):
    engine, z, timestep = engine_at(pipe, guidances, **options)
    return engine, engine.predict(z, timestep, 0, 4)


@pytest.mark.parametrize(
    "make",
    [
        Bright,
        Pixels,
        Features,
        Input,
        KeepZest,
        # The loss jumps at the edge of its dead zone, where a difference is no derivative.
        lambda: KeepZest(aggregate="head", loss="power4", tokens="real", dead_zone=0.0),
        lambda: KeepZest(aggregate="top", top=3, loss="mse", negatives=("green",)),
        lambda: KeepZest(aggregate="layer", loss="bce_normalised"),
    ],
)
def test_gradients_agree_with_finite_differences(make):
    engine, z, timestep = engine_at(double_pipe(), [make()])
    (guidance,) = engine.guidances
    engine.predict(z, timestep, 0, 4)
    assert guidance.value.dtype == guidance.grad.dtype == torch.float64
    grad, h = guidance.grad, 1e-5
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    values = []
    for sign in (1, -1):
        engine.predict(z + sign * h * direction, timestep, 0, 4)
        values.append(guidance.value.detach())
    expected = (values[0] - values[1]) / (2 * h)
    # Under the default rule the gradient carries the scale, which is 1 here.
    torch.testing.assert_close((grad * direction).sum((1, 2, 3)), expected, rtol=1e-5, atol=1e-10)
    assert (expected.abs() > 1e-9).all()


def test_one_backward_for_each_push_rule(pipe, monkeypatch):
    class Score(Bright):
        def energy(self, step):
            return step.x0.flatten(1).mean(1)

        push = Guidance.push

    class Second(Score):
        pass

    guidances = [Score(), Second(scale=2.0), Zest(), Zest(), Zest(eps=1e-3)]
    engine, z, timestep = engine_at(pipe, guidances)
    calls = []
    real = torch.autograd.grad

    def counted(*args, **kwargs):
        calls.append(kwargs["retain_graph"])
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    engine.predict(z, timestep, 0, 4)
    assert engine.injector.backwards == 3
    assert calls == [True, True, False]
    assert len(engine.run.account.rows) == 5
    engine, _ = predict(pipe, [])
    assert engine.injector.backwards == 0


def test_rules_of_lists_are_compared(pipe):
    @dataclass(kw_only=True)
    class Listed(Bright):
        names: list = field(default_factory=lambda: ["a"])

        def push(self, step, grad):
            return step.move.shift(-grad)

    engine, _ = predict(pipe, [Listed(), Listed(), Listed(names=["b"])])
    assert engine.injector.backwards == 2


def test_energies_of_one_rule_add_up_with_their_scales(pipe):
    class First(Guidance):
        def energy(self, step):
            return (step.x0**2).flatten(1).mean(1)

    class Second(Guidance):
        def energy(self, step):
            return step.x0.flatten(1).mean(1)

    changes = []
    for guidances in (
        [First(scale=2.0)],
        [Second(scale=-3.0)],
        [First(scale=2.0), Second(scale=-3.0)],
    ):
        _, step = predict(pipe, guidances)
        changes.append(step.prediction - step.out)
    assert changes[0].abs().max() > 1e-4
    torch.testing.assert_close(changes[0] + changes[1], changes[2], rtol=1e-4, atol=1e-6)


def saved(run):
    """Bytes that autograd saves while `run` runs, each tensor counted as often as it is saved."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return result, total


def test_only_branches_that_are_read_carry_a_graph(pipe):
    def evals(*guidances, calls="split"):
        graphs = {}

        class Look(Guidance):
            def combine(self, step, outs, combined):
                graphs.update({name: out.requires_grad for name, out in outs.items()})
                return combined

        given = {"seeds": (0,), "calls": {"null+cond*": calls}}
        _, total = saved(lambda: predict(pipe, [*guidances, Look()], **given))
        return graphs, total

    none, zero = evals()
    attention, less = evals(Zest())
    features, early = evals(Features())
    x0, most = evals(Bright())
    assert none == attention == features == {"null": False, "cond": False}
    assert zero == 0
    assert x0 == {"null": True, "cond": True}
    assert 0 < early < less < most / 1.5
    own, tiny_graph = evals(Input())
    assert own == none
    assert tiny_graph < early / 100
    both, more = evals(Zest(), calls="batched")
    assert both == none
    assert less < more < 2.5 * less


def test_energies_on_x0_work_where_the_caller_has_gradients_off(pipe):
    expected = predict(pipe, [Bright()])[1].prediction
    with torch.no_grad():
        assert torch.equal(predict(pipe, [Bright()])[1].prediction, expected)


@pytest.mark.parametrize(
    "guidances", [lambda: [PaintWithWords(), KeepZest(), Bright()], lambda: [KeepZest()]]
)
def test_low_memory_has_the_gradients_of_fast(pipe, guidances):
    split = {"null+cond*": "split"}
    (fast, a), plenty = saved(lambda: predict(pipe, guidances(), calls=split))
    (low, b), little = saved(lambda: predict(pipe, guidances(), memory="low"))
    assert little < plenty / 2  # what a checkpoint computes again is not counted
    torch.testing.assert_close(a.prediction, b.prediction, rtol=1e-5, atol=1e-6)
    for one, other in zip(fast.guidances, low.guidances, strict=True):
        if hasattr(one, "grad"):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    assert not pipe.unet.is_gradient_checkpointing


class Second(Guidance):
    """Reads features in a denoiser call of its own."""

    def prepare(self, run):
        self.read = run.read(self, FeatureRead(("down_blocks.1",)), main=False)
        self.passed = []

    def energy(self, step):
        x = step.z.detach() * 0.5
        self.x = x.requires_grad_()
        self.eval = step.denoise(self.x, 7, self, stop=True)
        (features,) = self.eval.features(self.read).values()
        return (features**2).flatten(1).mean(1) + 0 * step.z.flatten(1).sum(1)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_second_call_reads_its_own_sites_and_stops_there(pipe, memory):
    calls = []
    engine, z, timestep = engine_at(pipe, [Second()], memory=memory)
    (guidance,) = engine.guidances
    handle = pipe.unet.mid_block.register_forward_hook(lambda *a: calls.append("mid"))
    try:
        step = engine.predict(z, timestep, 0, 4)
    finally:
        handle.remove()
    assert calls == ["mid"] * len(calls)
    assert guidance.eval.out is None
    # Only the main call of null and cond reached the middle (checkpoints run it again in backward).
    assert len(calls) == 1
    expected = {}
    handle = pipe.unet.down_blocks[1].register_forward_hook(
        lambda m, args, out: expected.update(out=out[0])
    )
    with torch.no_grad():
        pipe.unet(guidance.x, 7, step.run.text([RED.prompt] * 2).states)
    handle.remove()
    (features,) = guidance.eval.features(guidance.read).values()
    torch.testing.assert_close(features, expected["out"])
    (grad,) = torch.autograd.grad(features.square().sum(), guidance.x)
    assert grad.abs().max() > 0


def test_a_gradient_that_is_not_finite_raises_or_is_left_out(pipe):
    class Broken(Guidance):
        def energy(self, step):
            factor = torch.tensor([1.0, float("nan")])
            return factor * step.x0.flatten(1).mean(1)

    with pytest.raises(NonFiniteError, match=r"broken is not finite at step 0 for seeds \[1\]"):
        predict(pipe, [Broken()])
    engine, step = predict(pipe, [Broken()], nonfinite="zero")
    assert not torch.equal(step.prediction[0], step.out[0])
    assert torch.equal(step.prediction[1], step.out[1])
    assert "seeds [1]" in engine.run.account.notes[0]


def test_energies_of_a_wrong_kind_raise(pipe):
    class Sum(Guidance):
        def energy(self, step):
            return step.x0.sum()

    class Apart(Guidance):
        def energy(self, step):
            return torch.zeros(2)

    class Hidden(Guidance):
        graph = "input"

        def energy(self, step):
            return step.x0.detach().flatten(1).mean(1)

    with pytest.raises(ValueError, match=r"energy of sum has shape \(\); .* \(2,\)"):
        predict(pipe, [Sum()])
    for guidance in (Apart(), Hidden()):
        with pytest.raises(ValueError, match="does not depend on z"):
            predict(pipe, [guidance])


def test_half_precision_has_energies_and_gradients_in_float32():
    pipe = tiny.sd_pipeline().to(torch.bfloat16)
    guidances = [KeepZest(), Bright(), Pixels(), PaintWithWords()]
    sampling = Sampling(pipe, RED, guidances, steps=2).finish()
    own = sampling.guidances[:3]
    assert {g.value.dtype for g in own} == {g.grad.dtype for g in own} == {torch.float32}
    assert all((g.grad != 0).any() for g in own)
    assert sampling.latents.dtype == torch.bfloat16
    assert torch.isfinite(sampling.images).all()
    assert pipe.vae.dtype == torch.bfloat16


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

    with pytest.raises(ValueError, match="two branches are called 'cond'"):
        predict(pipe, [Twice()])
    with pytest.raises(ValueError, match="no base among the branches cond"):
        predict(pipe, [Baseless()])
    with pytest.raises(ValueError, match="zest reads the branch 'cond'"):
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
