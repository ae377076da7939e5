"""The injector: rules, loss scales of half precision, what is not finite, and who raised what."""

import pytest
import torch

import tiny
from guidekit import Condition, FeatureRead, Guidance, Sampling, Segment, box_mask
from guidekit.engine.precision import Rescaled
from guidekit.errors import NonFiniteError, where_of
from guidekit.reads import Eval
from guidekit_zest import Zest

RED = Condition("a red circle", segments=(Segment("red circle", box_mask((0, 0, 0.5, 1))),))
SPLIT = {"null+cond*": "split"}


class Bright(Guidance):
    """An energy of the combined x0; its gradient is kept."""

    factor = 1.0

    def energy(self, step):
        return self.factor * (step.x0**2).flatten(1).mean(1)

    def push(self, step, grad):
        self.grad = grad
        return step.move.score(-grad)


class Twice(Bright):
    """Through a second call on the clean estimate, whose features it reads."""

    def prepare(self, run):
        self.read = run.read(self, FeatureRead(("mid_block",)), main=False)

    def energy(self, step):
        found = step.denoise(step.x0, 7, self, stop=True).features(self.read)["mid_block"]
        return self.factor * (found.float() ** 2).flatten(1).mean(1)


class Maps(Zest):
    """Zest whose gradient is kept."""

    def push(self, step, grad):
        self.grad = grad
        return super().push(step, grad)


def gradient(pipe, guidance, seeds=(0, 1)):
    sampling = Sampling(pipe, RED, [guidance], seeds=seeds, steps=4, cfg=4.0, calls=SPLIT)
    run, draws = sampling.run, [torch.Generator().manual_seed(seed) for seed in seeds]
    # In float32 first: what a generator draws in float16 depends on torch's version.
    z = torch.stack([torch.randn(run.latent_shape, generator=draw) for draw in draws])
    sampling.engine.predict(z.to(sampling.denoiser.dtype), run.scheduler.timesteps[1], 1, 4)
    return sampling.guidances[0].grad.double()


def cosines(one, other):
    return torch.nn.functional.cosine_similarity(one.flatten(1), other.flatten(1))


@pytest.mark.parametrize("kind", [Bright, pytest.param(Twice, marks=pytest.mark.full), Maps])
def test_half_precision_has_the_gradient_of_full(kind):
    exact = gradient(tiny.sd_pipeline(), kind())
    half = gradient(tiny.sd_pipeline().to(torch.float16), kind())
    assert (cosines(half, exact) > 0.99).all()
    torch.testing.assert_close(
        half.flatten(1).norm(dim=1), exact.flatten(1).norm(dim=1), rtol=0.05, atol=0
    )


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(Bright, marks=pytest.mark.full),
        pytest.param(Twice, marks=pytest.mark.full),
        Maps,
    ],
)
def test_autocast_has_it_too(kind):
    pipe = tiny.sd_pipeline()
    exact = gradient(pipe, kind())
    with torch.autocast("cpu", dtype=torch.float16):
        half = gradient(pipe, kind())
    assert (cosines(half, exact) > 0.99).all()


@pytest.mark.parametrize("factor", [2.0**-20, pytest.param(2.0**20, marks=pytest.mark.full)])
def test_no_factor_of_an_energy_under_or_overflows(factor):
    """The gradient that enters the network is brought to one size, whatever the energy's."""
    pipe = tiny.sd_pipeline().to(torch.float16)
    plain, scaled = Bright(), Bright()
    scaled.factor = factor
    one, other = gradient(pipe, plain), gradient(pipe, scaled)
    assert (one.abs().amax((1, 2, 3)) > 0).all()
    torch.testing.assert_close(other / factor, one, rtol=1e-6, atol=0)


def test_the_scale_is_of_each_image_and_a_power_of_two():
    x = torch.ones(3, 4, 2, 2).requires_grad_()
    scaling = Rescaled()
    out = scaling.enter(x) * 2.0
    (evaluation,) = scaling.leave([Eval(None, out)])
    weights = torch.tensor([3e-5, 1.0, 0.0])[:, None, None, None]
    (grad,) = torch.autograd.grad((evaluation.out * weights).sum(), x)
    torch.testing.assert_close(grad, 2.0 * weights.expand_as(x))
    (scales,) = scaling.scales
    assert scales.tolist() == [2.0**15, 0.5, 1.0]


def test_what_is_not_finite_is_zero_for_its_image_alone():
    class Broken(Bright):
        def energy(self, step):
            return super().energy(step) * torch.tensor([1.0, float("nan")])

    pipe = tiny.sd_pipeline()
    options = {"seeds": [3, 4], "steps": 2, "cfg": 4.0}
    with pytest.raises(NonFiniteError, match=r"not finite at step 0 for seeds \[4\]"):
        Sampling(pipe, RED, [Broken()], **options).finish()
    found = Sampling(pipe, RED, [Broken()], nonfinite="zero", **options).finish()
    plain = Sampling(pipe, RED, [Bright()], **options).finish()
    bare = Sampling(pipe, RED, **options).finish()
    torch.testing.assert_close(found.latents[0], plain.latents[0])
    assert torch.equal(found.latents[1], bare.latents[1])
    assert len(found.account.notes) == 2


HOOKS = ("prepare", "branches", "edit_input", "edit_attention", "edit_block", "combine", "energy")


@pytest.mark.parametrize("hook", [*HOOKS, "push", "edit_prediction", "edit_sample", "repeats"])
def test_a_foreign_exception_says_whose_it_is(hook):
    def bug(self, *given):
        raise KeyError("a bug")

    class Buggy(Bright):
        def prepare(self, run):
            run.tap_attention(self, "mid_block*attn1")
            run.tap_blocks(self, "mid_block")

    members = {hook: bug}
    if hook == "prepare":
        kind = type("Buggy", (Bright,), members)
    else:
        kind = type("Buggy", (Buggy,), members)
    with pytest.raises(KeyError, match="a bug") as caught:
        Sampling(tiny.sd_pipeline(), RED, [kind()], steps=2).finish()
    where = where_of(caught.value)
    assert (where.plugin, where.hook) == ("buggy", hook)
    assert where.step == (None if hook == "prepare" else 0)


def test_no_number_of_the_account_is_read_before_it_is_asked_for():
    class Look(Guidance):
        def edit_prediction(self, step, out):
            (row,) = step.run.account._rows
            kinds.append({type(row[k]) for k in ("energy", "grad_norm", "update_ratio")})
            return out * 1.0

    kinds = []
    guidances = [Bright(), Look()]
    sampling = Sampling(tiny.sd_pipeline(), RED, guidances, seeds=[3, 4], steps=1).finish()
    assert kinds == [{torch.Tensor}]
    (row,) = sampling.account.rows
    assert all(isinstance(value, float) for value in row["grad_norm"] + row["energy"])
