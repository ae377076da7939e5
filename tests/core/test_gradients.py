"""Gradients of one step: finite differences, one backward for a rule, graphs, memory, refusals."""

import functools
from dataclasses import dataclass, field

import pytest
import torch

import tiny
from guidekit import FeatureRead, Guidance, Sampling
from guidekit.errors import GuidekitError, NonFiniteError
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest
from one_step import RED, Bright, Input, Keep, engine_at, predict


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@functools.cache
def double_pipe():
    return tiny.sd_pipeline().to(torch.float64)


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


class KeepZest(Zest):
    """Zest that keeps its energy and its gradient."""

    def energy(self, step):
        self.value = super().energy(step)
        return self.value

    def push(self, step, grad):
        self.grad = grad
        return super().push(step, grad)


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
        pytest.param(
            lambda: KeepZest(aggregate="top", top=3, loss="mse", negatives=("green",)),
            marks=pytest.mark.full,
        ),
        pytest.param(
            lambda: KeepZest(aggregate="layer", loss="bce_normalised"), marks=pytest.mark.full
        ),
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

    with pytest.raises(GuidekitError, match=r"energy of sum has shape \(\); .* \(2,\)"):
        predict(pipe, [Sum()])
    for guidance in (Apart(), Hidden()):
        with pytest.raises(GuidekitError, match="does not depend on z"):
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
