"""Few-shot guidance: the paper's step by hand, its cheaper forms, rejection, refusals."""

from typing import ClassVar, get_args

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from guidekit import Condition, Denoiser, Sampling, Segment, box_mask, draw
from guidekit.errors import GuidekitError
from guidekit.heads import Examples, FitOptions, Reading, fit
from guidekit.heads.augment import accepted_images
from guidekit.heads.fingerprint import fingerprint
from guidekit.heads.head import Head, HeadConfig
from guidekit.options import option_kinds
from guidekit.sampler import accepted
from guidekit.testing.miniatures import ddpm_pipeline, sd_pipeline
from guidekit_fewshot import Fewshot
from guidekit_zest import Zest

SITES = ("mid_block", "up_blocks.0")
NAMES = ("a", "b", "c")
NOTHING = Condition()


def make_head(denoiser, kind="classes", noised=False, timesteps=(500,), seed=3):
    """A head with random weights on a backbone's features."""
    channels = {"mid_block": 64, "up_blocks.0": 64}
    width = sum(channels.values()) * (1 if kind == "masks" else 4)
    width *= 1 if noised else len(timesteps)
    reading = Reading(SITES, timesteps, noised, 0 if kind == "masks" else 2)
    _, h, w = denoiser.latent_shape(None, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(
            HeadConfig(
                kind,
                NAMES,
                reading,
                width,
                grid=(h, w) if kind == "masks" else None,
                values=(0, 1, 2),
                backbone=fingerprint(denoiser),
            )
        )
    return head.eval().requires_grad_(False)


@pytest.fixture
def pipe():
    pipe = ddpm_pipeline()
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    return pipe


@pytest.fixture
def wide(pipe):
    return pipe.to(torch.float64)


def saved(head, tmp_path, name="head"):
    return head.save(tmp_path / name)


def features(model, x, timestep):
    """Features by hooks, as the released notebook takes them."""
    kept = {}
    hooks = [
        model.get_submodule(site).register_forward_hook(
            lambda module, given, out, site=site: kept.__setitem__(site, out)
        )
        for site in SITES
    ]
    out = model(x, timestep).sample
    for hook in hooks:
        hook.remove()
    return out, kept


def by_hand(pipe, head, z, timestep, loss):
    """eps - s * d(-25 loss)/dz with both calls in the graph, for an epsilon model."""
    alpha_bar = pipe.scheduler.alphas_cumprod[timestep].double()
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    z = z.clone().requires_grad_()
    eps = pipe.unet(z, timestep).sample
    x0 = (z - s * eps) / a
    _, maps = features(pipe.unet, x0, 500)
    (grad,) = torch.autograd.grad(-25 * loss(head([maps])).sum(), z)
    return eps.detach() - s * grad


def test_the_papers_step_by_hand(wide, tmp_path):
    denoiser = Denoiser(wide)
    head = make_head(denoiser).double()
    guidance = Fewshot(head=saved(head, tmp_path), label="b", form="paper")
    sampling = Sampling(denoiser, Condition(), [guidance], seeds=[0, 1], steps=4)
    z = sampling.run.noise(sampling.run.latent_shape, "z").double()
    timestep = sampling.run.scheduler.timesteps[2]
    step = sampling.engine.predict(z, timestep, 2, 4)
    target = torch.tensor([1, 1])
    expected = by_hand(
        wide,
        sampling.guidances[0]._head,
        z,
        int(timestep),
        lambda logits: F.cross_entropy(logits, target, reduction="none"),
    )
    torch.testing.assert_close(step.prediction, expected, rtol=1e-9, atol=1e-9)


def test_a_masks_energy_is_the_mean_over_pixels(wide, tmp_path):
    denoiser = Denoiser(wide)
    head = make_head(denoiser, "masks").double()
    masks = torch.randint(3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    guidance = Fewshot(head=saved(head, tmp_path), form="paper")
    conditions = [Condition(targets={"fewshot": mask}) for mask in masks]
    sampling = Sampling(denoiser, conditions, [guidance], seeds=[0, 1], steps=4)
    z = sampling.run.noise(sampling.run.latent_shape, "z").double()
    timestep = sampling.run.scheduler.timesteps[1]
    step = sampling.engine.predict(z, timestep, 1, 4)
    expected = by_hand(
        wide,
        sampling.guidances[0]._head,
        z,
        int(timestep),
        lambda logits: F.cross_entropy(logits, masks, reduction="none").mean((1, 2)),
    )
    torch.testing.assert_close(step.prediction, expected, rtol=1e-9, atol=1e-9)


def first_step(pipe, guidance, index=2, conditions=NOTHING, **options):
    sampling = Sampling(pipe, conditions, [guidance], seeds=[0, 1], steps=4, **options)
    z = sampling.run.noise(sampling.run.latent_shape, "z").to(sampling.denoiser.dtype)
    return sampling.engine.predict(z, sampling.run.scheduler.timesteps[index], index, 4)


def test_every_picture_can_have_a_class_of_its_own(pipe, tmp_path):
    folder = saved(make_head(Denoiser(pipe)), tmp_path)
    both = Fewshot(head=folder, form="detached")
    own = [Condition(targets={"fewshot": target}) for target in (1, "c")]
    together = first_step(pipe, both, conditions=own).prediction
    for i, label in enumerate("bc"):
        alone = first_step(pipe, Fewshot(head=folder, form="detached", label=label)).prediction
        torch.testing.assert_close(together[i], alone[i], rtol=1e-5, atol=1e-6)
    with pytest.raises(GuidekitError, match="1 of 2 conditions have a target for fewshot"):
        first_step(pipe, both, conditions=[own[0], Condition()])
    with pytest.raises(GuidekitError, match="the head has 3 classes, none of number 3"):
        first_step(pipe, both, conditions=Condition(targets={"fewshot": 3}))
    with pytest.raises(GuidekitError, match="a target for 'fewshto'; the guidances are fewshot"):
        first_step(pipe, both, conditions=Condition(targets={"fewshto": 0}))


def test_targets_survive_retries_and_batches(pipe, tmp_path):
    """Each image is judged by its own target, also where it is drawn again in another batch."""
    folder = saved(make_head(Denoiser(pipe)), tmp_path)
    judged = []

    class Watched(Fewshot):
        def accept(self, images):
            judged.append(self._target.argmax(1).tolist())
            return torch.tensor([row != 1 for row in judged[-1]]) | (len(judged) > 2)

    guidance = Watched(head=folder, form="detached")
    guidance._name = "fewshot"
    own = [Condition(targets={"fewshot": target}) for target in (0, 1, 2, 1)]
    images = draw(pipe, own, [guidance], seeds=range(4), steps=2, tries=2, batch=2)
    assert judged == [[0, 1], [2, 1], [1, 1]]
    assert images.shape[0] == 4


def test_a_scale_of_zero_rejects_and_changes_nothing(pipe, tmp_path):
    folder = saved(make_head(Denoiser(pipe)), tmp_path)
    alone = Fewshot(head=folder, label="b", scale=0.0, threshold=1.0)
    options = dict(seeds=[0, 1], steps=2)
    judged = Sampling(pipe, Condition(), [alone], **options).finish()
    assert torch.equal(judged.images, Sampling(pipe, Condition(), **options).finish().images)
    assert accepted(judged.guidances, judged.images).tolist() == [False, False]
    again = draw(pipe, Condition(), [alone], tries=2, **options)
    assert not torch.equal(again, judged.images)  # rejected, so drawn from other seeds
    found = accepted_images(Denoiser(pipe), alone, 2, tries=2, steps=2)
    assert found == (None, 4, 0)


def test_stopping_the_second_call_changes_nothing(wide, tmp_path):
    head = saved(make_head(Denoiser(wide)), tmp_path)
    whole, stopped = (
        first_step(wide, Fewshot(head=head, label="a", form=form)) for form in ("paper", "stopped")
    )
    assert torch.equal(whole.prediction, stopped.prediction)


def test_detached_has_the_gradient_of_the_second_call_alone(wide, tmp_path):
    folder = saved(make_head(Denoiser(wide)), tmp_path)
    guidance = Fewshot(head=folder, label="a", form="detached")
    step = first_step(wide, guidance)
    (guidance,) = step.run.guidances
    x0 = step.level.x0(step.out, step.z).detach().requires_grad_()
    _, maps = features(wide.unet, x0, 500)
    loss = F.cross_entropy(guidance._head([maps]), torch.tensor([0, 0]), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x0)
    a, s = step.level.a, step.level.s
    expected = step.out.detach() + s * 25 * a / (a**2 + s**2) * grad
    torch.testing.assert_close(step.prediction, expected, rtol=1e-9, atol=1e-9)


def test_first_reads_the_first_call_by_the_nearest_readout(wide, tmp_path):
    folder = saved(make_head(Denoiser(wide), noised=True, timesteps=(100, 500)), tmp_path)
    guidance = Fewshot(head=folder, label="c", form="first")
    step = first_step(wide, guidance)  # at timestep 250
    (guidance,) = step.run.guidances
    z = step.z.clone().requires_grad_()
    out, maps = features(wide.unet, z, 250)
    logits = guidance._head.readouts[0](guidance._head.assembled([maps]))[..., 0, 0]
    loss = F.cross_entropy(logits, torch.tensor([2, 2]), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), z)
    expected = out.detach() + step.level.s * 25 * grad
    torch.testing.assert_close(step.prediction, expected, rtol=1e-9, atol=1e-9)


def test_labels_that_nobody_asked_for_do_not_count(pipe, tmp_path):
    guidance = Fewshot(head=saved(make_head(Denoiser(pipe), "labels"), tmp_path), label="a,-c")
    (guidance,) = first_step(pipe, guidance).run.guidances
    assert guidance._target[0, :1].tolist() == [1]
    assert guidance._target[0, 2] == 0
    logits = torch.tensor([[2.0, 50.0, -1.0]])
    loss = guidance._head.loss(logits, guidance._target[:1])
    expected = (F.softplus(torch.tensor(-2.0)) + F.softplus(torch.tensor(-1.0))) / 2
    torch.testing.assert_close(loss, expected[None])
    sure = guidance._head.confidence(logits, guidance._target[:1])
    torch.testing.assert_close(
        sure, torch.sigmoid(torch.tensor([2.0])) * torch.sigmoid(torch.tensor([1.0]))
    )


@pytest.mark.parametrize("form", get_args(option_kinds(Fewshot)["form"]))
def test_every_form_lowers_its_energy(pipe, tmp_path, form):
    head = saved(make_head(Denoiser(pipe), noised=form == "first"), tmp_path)

    def energies(scale):
        guidance = Fewshot(head=head, label="b", form=form, scale=scale)
        drawn = Sampling(pipe, Condition(), [guidance], seeds=[0, 1], steps=6).finish()
        return torch.tensor([row["energy"] for row in drawn.account.rows])

    assert (energies(10.0)[-1] < energies(1e-9)[-1]).all()


def test_it_composes_with_classifier_free_guidance_and_zest(tmp_path):
    pipe = sd_pipeline()
    denoiser = Denoiser(pipe)
    head = saved(make_head(denoiser), tmp_path)
    condition = Condition(
        "a red circle", segments=(Segment("red circle", box_mask((0, 0, 0.5, 1))),)
    )
    fewshot, zest = Fewshot(head=head, label="a"), Zest(stop=1.0)
    drawn = Sampling(denoiser, condition, [fewshot, zest], seeds=[0], steps=3, cfg=4.0).finish()
    assert drawn.account.acted("fewshot")
    assert drawn.account.acted("zest")
    alone = Sampling(denoiser, condition, [fewshot], seeds=[0], steps=3, cfg=4.0).finish()
    assert not torch.equal(alone.latents, drawn.latents)


def test_a_fit_works_in_latents(tmp_path):
    pipe = sd_pipeline()
    pictures = torch.zeros(6, 3, 32, 32)
    pictures[::2, :, :16] = 0.8
    examples = Examples.of(pictures, torch.arange(6) % 2, ["top", "none"])
    head, _ = fit(Denoiser(pipe), examples, FitOptions(sites=("mid_block",)))
    guidance = Fewshot(head=saved(head, tmp_path), label="top")
    drawn = Sampling(pipe, Condition(), [guidance], seeds=[0], steps=2, cfg=2.0).finish()
    assert drawn.account.acted("fewshot")


class Counting(Fewshot):
    """Counts the images that it judges."""

    seen: ClassVar[list] = []

    def accept(self, images):
        self.seen.append(len(images))
        return super().accept(images)


def test_rejection_is_by_the_heads_probability_and_bounded(pipe, tmp_path):
    denoiser = Denoiser(pipe)
    head = make_head(denoiser)
    folder = saved(head, tmp_path)
    guidance = Fewshot(head=folder, label="a", scale=1e-6)
    drawn = Sampling(pipe, Condition(), [guidance], seeds=range(4), steps=2).finish()
    images, (guidance,) = drawn.images, drawn.guidances
    p = head.predict(denoiser, images * 2 - 1).softmax(1)[:, 0]
    guidance.threshold = float(p.median()) + 1e-6
    assert torch.equal(guidance.accept(images), p >= guidance.threshold)
    Counting.seen.clear()
    never = Counting(head=folder, label="a", threshold=1.0)
    assert draw(pipe, Condition(), [never], seeds=[0, 1], tries=3, steps=2).shape[0] == 2
    assert sum(never.seen) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a head"),
        ({"head": "HEAD"}, "needs a label"),
        ({"head": "HEAD", "label": "z"}, "no class 'z'"),
        ({"head": "HEAD", "label": "a", "form": "first"}, "--noised"),
        ({"head": "MASKS"}, "needs a mask"),
    ],
)
def test_what_cannot_work_raises_before_the_run(pipe, tmp_path, options, message):
    denoiser = Denoiser(pipe)
    folders = {"HEAD": saved(make_head(denoiser), tmp_path)}
    folders["MASKS"] = saved(make_head(denoiser, "masks"), tmp_path, "masks")
    options = {k: folders.get(v, v) for k, v in options.items()}
    with pytest.raises(GuidekitError, match=message):
        Sampling(pipe, Condition(), [Fewshot(**options)])


@pytest.mark.parametrize("options", [{"form": "second"}, {"threshold": 1.5}])
def test_wrong_values_raise(options):
    with pytest.raises(GuidekitError, match="fewshot"):
        Fewshot(**options)
