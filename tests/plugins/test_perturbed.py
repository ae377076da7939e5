"""diffusers' guiders as plugins: equal to diffusers where it is right, acting where it is not."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPAGPipeline
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

import tiny
from guidekit import Condition, Sampling, Segment, box_mask
from guidekit.errors import GuidekitError
from guidekit_apg import AdaptiveProjected
from guidekit_autoguidance import Autoguidance
from guidekit_cfg import ClassifierFree
from guidekit_multidiffusion import MultiDiffusion
from guidekit_pag import PerturbedAttention
from guidekit_seg import SmoothedEnergy, blurred
from guidekit_slg import SkipLayer

CONDITION = Condition("a red circle", segments=(Segment("red circle", box_mask((0, 0, 0.5, 1))),))
PERTURBED = [PerturbedAttention(), SmoothedEnergy(), SkipLayer.example(), Autoguidance()]


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def run(pipe, *guidances, steps=3, cfg=5.0, seeds=(3,), **options):
    return Sampling(pipe, CONDITION, guidances, seeds=seeds, steps=steps, cfg=cfg, **options)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_pag_is_diffusers_pag_pipeline(pipe, cfg):
    # A pipeline of its own: setting up PAG there leaves processors behind.
    theirs = StableDiffusionPAGPipeline(
        **tiny.sd_pipeline().components, requires_safety_checker=False, pag_applied_layers="mid"
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        CONDITION.prompt,
        num_inference_steps=3,
        guidance_scale=cfg,
        pag_scale=3.0,
        generator=[torch.Generator().manual_seed(3)],
        output_type="pt",
    ).images
    ours = run(pipe, PerturbedAttention(), cfg=cfg).finish().images
    assert (ours - expected).abs().max() < 1e-5
    assert (ours - run(pipe, cfg=cfg).finish().images).abs().max() > 1e-4


def test_the_perturbed_branch_is_added_with_the_scale(pipe):
    for guidance in PERTURBED:
        step = next(iter(run(pipe, guidance)))
        outs = {name: e.out for name, e in step.evals.items()}
        assert list(outs) == ["null", "cond", guidance.name]
        combined = outs["null"] + 5.0 * (outs["cond"] - outs["null"])
        expected = combined + guidance.scale * (outs["cond"] - outs[guidance.name])
        torch.testing.assert_close(step.prediction, expected)
        assert not torch.equal(outs["cond"], outs[guidance.name])


def test_several_perturbations_add_up(pipe):
    one, two = PerturbedAttention(), SkipLayer.example()
    bare = next(iter(run(pipe))).prediction
    changes = [next(iter(run(pipe, *g))).prediction - bare for g in ([one], [two], [one, two])]
    torch.testing.assert_close(changes[0] + changes[1], changes[2], rtol=1e-4, atol=1e-5)


def test_only_its_own_branch_is_touched(pipe):
    class Everywhere(PerturbedAttention):
        def touches(self, branch):
            return True

    for cls, same in ((PerturbedAttention, False), (Everywhere, True)):
        step = next(iter(run(pipe, cls())))
        outs = {name: e.out for name, e in step.evals.items()}
        bare = next(iter(run(pipe))).evals["cond"].out
        assert torch.allclose(outs["cond"], bare, atol=1e-5) != same
        assert torch.equal(outs["cond"], outs["pag"]) == same


def test_blur_is_a_gaussian_on_a_grid_that_is_no_square():
    x = torch.randn(2, 3, 5, 9, generator=torch.Generator().manual_seed(0))
    # Within reflection's reach the kernel is the whole Gaussian, here by torchvision.
    from torchvision.transforms.functional import gaussian_blur

    expected = gaussian_blur(x, [7, 7], [1.0, 1.0])
    torch.testing.assert_close(blurred(x, 1.0), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(
        blurred(torch.ones(1, 2, 4, 3), 50.0).round(decimals=5), torch.ones(1, 2, 4, 3)
    )
    torch.testing.assert_close(blurred(x, 0.1), x)


def test_infinite_blur_makes_attention_the_same_everywhere(pipe):
    outs = []

    class Watching(SmoothedEnergy):
        def edit_attention(self, step, branch, call):
            super().edit_attention(step, branch, call)
            outs.append(F.scaled_dot_product_attention(call.query, call.key, call.value))

    list(run(pipe, Watching(), steps=1))
    assert outs
    for out in outs:
        torch.testing.assert_close(out, out[:, :, :1].expand_as(out))


def test_finite_blur_grows_towards_the_mean(pipe):
    def change(**options):
        step = next(iter(run(pipe, SmoothedEnergy(**options), height=32, width=48)))
        return step.evals["seg"].out - step.evals["cond"].out

    small, large, infinite = change(blur=0.3), change(blur=3.0), change()
    assert 0 < small.norm() < large.norm()
    assert (large - infinite).norm() < (small - infinite).norm()


def test_dropout_of_1_skips_the_blocks(pipe):
    sites = "mid_block.*"
    skipped = next(iter(run(pipe, SkipLayer(sites=f"{sites}transformer_blocks.*", start=0))))
    dropped = next(iter(run(pipe, Autoguidance(sites=f"{sites}transformer_blocks.*", dropout=1.0))))
    assert torch.equal(skipped.evals["slg"].out, dropped.evals["autoguidance"].out)


def test_masks_are_of_the_image_and_not_of_the_batch(pipe):
    """Drawn on the model's device from the seed, the step and the site."""

    def out(seeds):
        steps = run(pipe, Autoguidance(dropout=0.5), seeds=seeds, steps=2)
        return next(iter(steps)).evals["autoguidance"].out

    both, alone, other = out([3, 4]), out([4]), out([5])
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4)
    assert (alone - other).abs().max() > 1e-2


def test_dropout_keeps_the_mean_of_what_a_block_adds(pipe):
    shares = []

    class Watching(Autoguidance):
        def edit_block(self, step, branch, call):
            whole = call.run()
            out = super().edit_block(step, branch, call)
            kept = call.skip()
            added = whole - kept
            seen = added.abs() > 1e-3  # the share of less is rounding
            shares.append(((out - kept) / added)[seen])
            return out

    list(run(pipe, Watching(dropout=0.25), steps=1))
    found = torch.cat(shares)
    torch.testing.assert_close(found.unique().round(decimals=2).unique(), torch.tensor([0, 1.33]))
    assert abs(float(found.mean()) - 1) < 0.02


@pytest.mark.parametrize("options", [{}, {"parallel": 0.5, "bound": 1.0, "momentum": 0.0}])
def test_apg_is_diffusers_formula_on_x0(pipe, options):
    guidance = AdaptiveProjected(**options)
    momentum = MomentumBuffer(guidance.momentum)
    for step in run(pipe, guidance, cfg=8.0):
        cond, null = step.branch_x0("cond"), step.branch_x0("null")
        expected = normalized_guidance(
            cond,
            null,
            7.0,
            momentum,
            guidance.parallel,
            guidance.bound,
            use_original_formulation=True,
        )
        torch.testing.assert_close(
            step.level.x0(step.prediction, step.z), expected, rtol=1e-3, atol=1e-3
        )


def test_apg_that_adapts_nothing_is_classifier_free_guidance(pipe):
    plain = AdaptiveProjected(momentum=0.0, bound=0.0, parallel=1.0)
    assert torch.allclose(run(pipe, plain).finish().images, run(pipe).finish().images, atol=1e-5)


def test_apg_keeps_what_pag_added(pipe):
    orders = [
        [AdaptiveProjected(), PerturbedAttention()],
        [PerturbedAttention(), AdaptiveProjected()],
    ]
    one, two = (next(iter(run(pipe, *order))).prediction for order in orders)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_with_plugins_that_change_branches(pipe):
    pag = PerturbedAttention()
    for others in ([ClassifierFree(cfg_scale=4.0)], [MultiDiffusion()]):
        for order in ([pag, *others], [*others, pag]):
            for cfg in (1.0, 5.0):
                step = next(iter(run(pipe, *order, cfg=cfg)))
                assert "pag" in step.evals
                assert {b.name: b.weight for b in step.branches}["pag"] is None


def test_without_a_conditional_branch_it_says_why(pipe):
    windows = MultiDiffusion(window=8)
    with pytest.raises(GuidekitError, match="perturbs the branch 'cond', which another plugin has"):
        run(pipe, windows, PerturbedAttention()).finish()
    with pytest.raises(GuidekitError, match="cannot cut the branch 'pag'"):
        run(pipe, PerturbedAttention(), windows).finish()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PerturbedAttention(sites="*.attn2"), "attn2 cannot be perturbed by it; those"),
        (lambda: SmoothedEnergy(sites="nowhere"), "'nowhere' matches no attention site"),
        (lambda: SkipLayer(sites="mid_block", start=0), "mid_block cannot be perturbed"),
        (lambda: SmoothedEnergy(blur=0.0), "seg.blur must be positive"),
        (lambda: Autoguidance(dropout=0.0), "autoguidance.dropout"),
        (lambda: AdaptiveProjected(scale=2.0), "apg.scale is 1"),
        (lambda: AdaptiveProjected(momentum=1.0), "apg.momentum"),
        (lambda: AdaptiveProjected(bound=-1.0), "apg.bound"),
    ],
)
def test_what_cannot_work_raises(pipe, make, says):
    with pytest.raises(GuidekitError, match=says):
        run(pipe, make())


def test_apg_without_classifier_free_guidance_raises(pipe):
    with pytest.raises(GuidekitError, match="and cfg is 1"):
        run(pipe, AdaptiveProjected(), cfg=1.0)
