"""MultiDiffusion: against the paper's fusing of next samples, and its bootstrapping and windows."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPanoramaPipeline

import tiny
from guidekit import Condition, Guidance, Sampling, Segment, box_mask
from guidekit.errors import GuidekitError
from guidekit_multidiffusion import MultiDiffusion, region_masks, windows

LEFT, RIGHT = box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0, 1, 1))
MIDDLE = box_mask((0.25, 0, 0.75, 1))
TWO = Condition(
    "a white square",
    "blue",
    segments=(
        Segment("red circle", LEFT),
        Segment("circle", MIDDLE, prompt="a green circle", negative="red"),
    ),
)
ONE = Condition("a white square", segments=(Segment("blue square", RIGHT),))


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


def paper_step(pipe, step, scheduler, cfg, regions):
    """Next samples of every region by itself, averaged over the masks: the released code."""
    value, count = torch.zeros_like(step.z), torch.zeros_like(step.z)
    for prompt, negative, x, mask in regions:
        text = step.run.text([negative]), step.run.text([prompt])
        with torch.no_grad():
            null, cond = (pipe.unet(x, step.timestep, t.states).sample for t in text)
            out = null + cfg * (cond - null)
            moved = copy.deepcopy(scheduler).step(out, step.timestep, x).prev_sample
        value += moved * mask
        count += mask
    return torch.where(count > 0, value / count.clamp(min=1), value)


def test_one_step_is_the_papers_with_and_without_bootstrapping(pipe):
    guidance = MultiDiffusion(bootstrap=0.5)
    sampling = Sampling(pipe, TWO, [guidance], seeds=[3], steps=2, cfg=5.0)
    masks = region_masks([TWO], (16, 16))[0]
    background = (1 - masks.sum(0)).clamp(min=0)
    previous = None
    for step in sampling:
        if previous is not None:
            torch.testing.assert_close(step.z, previous, rtol=1e-4, atol=1e-4)
        inputs = [step.evals[n].branch.of(step.z) for n in ("cond", "region0", "region1")]
        assert torch.equal(inputs[1], step.z) == (step.index == 1)
        regions = zip(
            ["a white square", "red circle", "a green circle"],
            ["blue", "", "red"],
            inputs,
            [background, *masks],
            strict=True,
        )
        previous = paper_step(pipe, step, sampling.run.scheduler, 5.0, regions)
    torch.testing.assert_close(sampling.latents, previous, rtol=1e-4, atol=1e-4)


def test_bootstrapping_keeps_z_in_the_mask_and_shows_one_colour_around_it(pipe):
    guidance = MultiDiffusion(bootstrap=1.0)
    steps = list(Sampling(pipe, [TWO, ONE], [guidance], seeds=[3, 4], steps=3))
    (guidance,) = steps[0].run.guidances
    mask = region_masks([TWO, ONE], (16, 16))[:, 0, None].bool()
    for step in steps:
        x = step.evals["region0"].branch.x
        assert torch.equal(x[mask.expand_as(x)], step.z[mask.expand_as(x)])
        assert not torch.equal(x, step.z)
        assert step.evals["cond"].branch.x is None
        clean = (x - step.level.s * guidance._noise) / step.level.a
        for b in range(2):
            away = ~mask[b, 0]
            distances = (guidance._backgrounds - clean[b]).abs()[..., away].amax((1, 2))
            assert distances.min() < 1e-3


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_bootstrapping_noises_with_what_the_run_begins_with(pipe, scheduler):
    """As in the released code: a region's first input is z, but for the trace of the colour."""
    own = scheduler.from_config(pipe.scheduler.config)
    sampling = Sampling(pipe, TWO, [MultiDiffusion(bootstrap=1.0)], steps=10, scheduler=own)
    steps = iter(sampling)
    step = next(steps)
    away = ~region_masks([TWO], (16, 16))[0, 0].bool().expand(4, 16, 16)
    x, z = step.evals["region0"].branch.x[0][away], step.z[0][away]
    assert torch.corrcoef(torch.stack([x, z]))[0, 1] > 0.98
    kept = sampling.guidances[0]._noise
    torch.testing.assert_close(kept, step.z / step.level.norm)
    next(steps)
    assert sampling.guidances[0]._noise is kept


def test_without_the_main_prompts_branch_it_says_why(pipe):
    class Renames(Guidance):
        def branches(self, step, branches):
            return [replace(b, name="other") if b.name == "cond" else b for b in branches]

    sampling = Sampling(pipe, TWO, [Renames(), MultiDiffusion()], steps=2)
    with pytest.raises(GuidekitError, match="needs the branch 'cond'.*null, other"):
        sampling.finish()


def test_colours_change_with_step_and_region_but_not_with_the_batch(pipe):
    together = list(
        Sampling(pipe, [TWO, ONE], [MultiDiffusion(bootstrap=1.0)], seeds=[3, 4], steps=3)
    )
    alone = list(Sampling(pipe, ONE, [MultiDiffusion(bootstrap=1.0)], seeds=[4], steps=3))
    for one, both in zip(alone, together, strict=True):
        x, y = one.evals["region0"].branch.x[0], both.evals["region0"].branch.x[1]
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
    assert (alone[-1].images[0] - together[-1].images[1]).abs().max() < 1e-4


def test_every_region_has_its_own_null_with_the_same_input(pipe):
    step = next(iter(Sampling(pipe, TWO, [MultiDiffusion()], steps=3)))
    names = {b.name: b for b in step.branches}
    assert list(names) == ["null", "cond", "region0.null", "region0", "region1.null", "region1"]
    assert names["region1.null"].prompts == ["red"]
    assert names["region1"].prompts == ["a green circle"]
    for region in ("region0", "region1"):
        assert names[region].x is names[f"{region}.null"].x


def test_template_and_cfg_1(pipe):
    guidance = MultiDiffusion(template="a {} on white")
    step = next(iter(Sampling(pipe, TWO, [guidance], steps=2, cfg=1.0)))
    assert {b.name: b.prompts for b in step.branches} == {
        "cond": ["a white square"],
        "region0": ["a red circle on white"],
        "region1": ["a green circle"],
    }


def test_strength_weighs_overlapping_regions(pipe):
    def prediction(strength):
        segments = (Segment("red circle", LEFT, strength), Segment("blue square", MIDDLE))
        condition = Condition("a white square", segments=segments)
        guidance = MultiDiffusion(bootstrap=0.0)
        return next(iter(Sampling(pipe, condition, [guidance], steps=2)))

    step = prediction(3.0)
    red, blue = step.groups["region0"], step.groups["region1"]
    expected = (3 * red + blue) / 4
    torch.testing.assert_close(step.out[..., 4:8], expected[..., 4:8])
    torch.testing.assert_close(step.out[..., :4], red[..., :4])
    torch.testing.assert_close(step.out[..., 12:], plain_out(pipe)[..., 12:])


def plain_out(pipe):
    return next(iter(Sampling(pipe, Condition("a white square"), steps=2))).out


@pytest.mark.parametrize(
    "size, window, stride, expected",
    [
        ((16, 16), 0, 8, [None]),
        ((16, 16), 16, 8, [None]),
        ((16, 32), 16, 8, [(0, left, 16, 16) for left in (0, 8, 16)]),
        ((8, 20), 16, 8, [(0, left, 8, 16) for left in (0, 4)]),
    ],
)
def test_windows_cover_the_picture(size, window, stride, expected):
    found = windows(*size, window, stride)
    assert found == expected


def test_windows_of_a_full_turn_begin_at_every_stride():
    found = windows(16, 32, 16, 8, circular=True)
    assert found == [(0, left, 16, 16) for left in (0, 8, 16, 24)]
    assert windows(16, 16, 16, 8, circular=True) == [None]


def test_a_panorama_is_the_papers_mean_over_windows(pipe):
    guidance = MultiDiffusion(window=16, stride=4)
    condition = Condition("a red circle")
    sampling = Sampling(pipe, condition, [guidance], seeds=[2], steps=2, width=64)
    first, _ = list(sampling)
    views = windows(16, 32, 16, 4)
    value, count = torch.zeros_like(first.z), torch.zeros_like(first.z)
    null, cond = first.run.text([""]), first.run.text(["a red circle"])
    for _, left, _, width in views:
        x = first.z[..., left : left + width]
        with torch.no_grad():
            out0, out1 = (pipe.unet(x, first.timestep, t.states).sample for t in (null, cond))
        value[..., left : left + width] += out0 + 7.5 * (out1 - out0)
        count[..., left : left + width] += 1
    torch.testing.assert_close(first.out, value / count, rtol=1e-4, atol=1e-4)
    assert sampling.images.shape == (1, 3, 32, 64)


@pytest.mark.full
def test_a_panorama_is_diffusers_pipeline(pipe):
    parts = tiny.sd_pipeline().components | {"scheduler": DDIMScheduler(clip_sample=False)}
    theirs = StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 72, generator=torch.Generator().manual_seed(0))
    # Its windows have 64 latent pixels and eight pixels of the image for each, whatever the model.
    size = {"height": 16 * 8, "width": 72 * 8}
    given = {"num_inference_steps": 2, "guidance_scale": 5.0, "latents": noise}
    expected = theirs("a red circle", **given, **size, output_type="latent").images
    guidance = MultiDiffusion(window=64, stride=8, bootstrap=0.0)
    options = {"steps": 2, "cfg": 5.0, "latents": noise, "height": 32, "width": 144}
    ours = Sampling(
        pipe, "a red circle", [guidance], scheduler=DDIMScheduler(clip_sample=False), **options
    ).finish()
    torch.testing.assert_close(ours.latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segments", [(), ONE.segments])
def test_a_full_turn_has_no_place_where_it_begins(pipe, segments):
    """Turned noise gives the turned output, whatever lies at the edge; plain windows do not."""
    noise = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(0))
    turned = {8: noise.roll(8, -1), 0: noise}

    def out(by, circular):
        masks = [s.mask.roll(s.mask.shape[1] * by // 32, -1) for s in segments]
        moved = tuple(Segment(s.phrase, m) for s, m in zip(segments, masks, strict=True))
        guidance = MultiDiffusion(window=16, stride=8, bootstrap=0.0, circular=circular)
        options = {"latents": turned[by], "steps": 2, "width": 64}
        return next(
            iter(Sampling(pipe, Condition("a red", segments=moved), [guidance], **options))
        ).out

    torch.testing.assert_close(out(8, True), out(0, True).roll(8, -1), rtol=1e-4, atol=1e-4)
    assert (out(8, False) - out(0, False).roll(8, -1)).abs().max() > 1e-2


def test_windows_with_regions_leave_out_regions_that_they_do_not_touch(pipe):
    condition = Condition(
        "a white square", segments=(Segment("circle", box_mask((0, 0, 0.25, 1))),)
    )
    guidance = MultiDiffusion(window=16, stride=16)
    step = next(iter(Sampling(pipe, condition, [guidance], steps=2, width=64)))
    assert sorted(step.groups) == ["main@0,0", "main@0,16", "region0@0,0"]
    assert torch.isfinite(step.out).all()


def test_a_reader_of_the_whole_picture_is_told_that_windows_replace_it(pipe):
    from guidekit_zest import Zest

    condition = Condition("a red circle", segments=(Segment("circle", LEFT),))
    both = [MultiDiffusion(window=16), Zest()]
    with pytest.raises(GuidekitError, match="zest reads the branch 'cond'"):
        next(iter(Sampling(pipe, condition, both, steps=2, width=64)))


def test_works_beside_zest_in_whole_pictures(pipe):
    from guidekit_zest import Zest

    condition = Condition("a red circle", segments=(Segment("circle", LEFT),))
    sampling = Sampling(pipe, condition, [MultiDiffusion(), Zest()], steps=2).finish()
    assert sampling.account.acted("zest")
    assert sampling.account.edits == {"multidiffusion": 2}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": 0.5}, "on"),
        ({"template": "a thing"}, "template"),
        ({"bootstrap": 1.5}, "bootstrap"),
        ({"window": -1}, "window"),
        ({"stride": 0}, "stride"),
        ({"circular": True}, "circular needs"),
    ],
)
def test_wrong_values_raise(options, message):
    with pytest.raises(GuidekitError, match=message):
        MultiDiffusion(**options)


def test_conditions_that_cannot_work_raise(pipe):
    def start(*segments):
        Sampling(pipe, Condition("a", segments=segments), [MultiDiffusion()])

    with pytest.raises(GuidekitError, match="needs segments"):
        start()
    with pytest.raises(GuidekitError, match="no pixel of at least 0.5"):
        start(Segment("a", LEFT * 0.4))
    with pytest.raises(GuidekitError, match="must be positive"):
        start(Segment("a", LEFT, strength=0.0))
    with pytest.raises(GuidekitError, match="tokens"):
        start(Segment("a", LEFT, prompt="red " * 90))
