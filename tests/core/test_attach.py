"""The engine inside unmodified pipelines: the own loop's images, no trace, clear refusals."""

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

import tiny
from attaching import RED, SEGMENTS, Bright, Watch, own_loop
from drawing import draw
from guidekit import Condition, Guidance, Segment, attach, box_mask
from guidekit.errors import GuidekitError, where_of
from guidekit.taps import Patch, find_sites
from guidekit_cfg import ClassifierFree
from guidekit_clip import Clip
from guidekit_multidiffusion import MultiDiffusion
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest

BLUE = Condition("a blue square", "blue", (Segment("blue", box_mask((0, 0, 1, 0.5))),))


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


in_full = partial(pytest.param, marks=pytest.mark.full)


@dataclass(kw_only=True)
class Fresh(Watch):
    """Adds noise from the images' seeds after every step."""

    def edit_sample(self, step, z):
        return z + 0.1 * step.noise("fresh").to(z)


@pytest.mark.parametrize(
    "guidances, scheduler, options",
    [
        ([Zest()], None, {}),
        ([PaintWithWords(), Zest(stop=1.0)], DPMSolverMultistepScheduler, {}),
        in_full([Zest(start=0.3, stop=0.9), Bright()], EulerDiscreteScheduler, {}),
        ([ClassifierFree(rescale=0.7), Bright()], HeunDiscreteScheduler, {}),
        in_full([ClassifierFree(cfg_scale=3.0, stop=0.5)], None, {}),
        ([Fresh(), Zest()], None, {"eta": 0.7}),
        in_full([Clip.example(), Zest()], None, {"eta": 1.0}),
        in_full([replace(Clip.example(), on="x0", units="noise", scale=0.2)], None, {}),
    ],
)
def test_pictures_are_those_of_the_own_loop(pipe, guidances, scheduler, options):
    before = pipe.scheduler
    pipe.scheduler = (scheduler or type(before)).from_config(before.config)
    try:
        expected = own_loop(pipe, guidances, **options)
        with attach(pipe, guidances, segments=SEGMENTS, seeds=[5, 6]) as attached:
            got = draw(pipe, **options)
        assert torch.equal(got, expected)
        assert not torch.equal(got, draw(pipe, **options))
        assert all(attached.account.acted(g.name) for g in guidances)
    finally:
        pipe.scheduler = before


def test_sdxl_is_the_own_loop():
    pipe = tiny.sdxl_pipeline()
    expected = own_loop(pipe, [Zest(stop=1.0)])
    with attach(pipe, [Zest(stop=1.0)], segments=SEGMENTS, seeds=[5, 6]):
        assert torch.equal(draw(pipe), expected)


def test_layouts_per_prompt_and_pictures_per_prompt(pipe):
    expected = own_loop(pipe, [Zest()], [RED, BLUE])
    with attach(pipe, [Zest()], segments=[RED, BLUE.segments], seeds=[5, 6]):
        assert torch.equal(draw(pipe, prompt=["a red circle", "a blue square"]), expected)
    with attach(pipe, [Zest()], segments=RED, seeds=[5, 6]):
        got = draw(pipe, prompt="a red circle", negative_prompt="blue", num_images_per_prompt=2)
    assert torch.equal(got, own_loop(pipe, [Zest()]))


def test_without_classifier_free_guidance(pipe):
    with attach(pipe, [Zest()], segments=SEGMENTS, seeds=[5, 6]):
        got = draw(pipe, guidance_scale=1.0)
    assert torch.equal(got, own_loop(pipe, [Zest()], cfg=1.0))


def test_a_new_scheduler_inside_the_context_and_a_second_call(pipe):
    before = pipe.scheduler
    try:
        with attach(pipe, [Zest()], segments=SEGMENTS, seeds=[5, 6]):
            first = draw(pipe)
            pipe.scheduler = EulerDiscreteScheduler.from_config(before.config)
            second = draw(pipe)
        assert torch.equal(second, own_loop(pipe, [Zest()]))
    finally:
        pipe.scheduler = before
    assert torch.equal(first, own_loop(pipe, [Zest()]))


def test_without_guidances_nothing_is_wrapped(pipe):
    bare = draw(pipe)
    for guidances in ([], [Zest(scale=0)]):
        before = [set(vars(thing)) for thing in (pipe, pipe.unet, pipe.scheduler)]
        with attach(pipe, guidances, segments=SEGMENTS):
            assert [set(vars(t)) for t in (pipe, pipe.unet, pipe.scheduler)] == before
            assert torch.equal(draw(pipe), bare)


class Broken(Watch):
    """Fails in the second step."""

    def edit_prediction(self, step, out):
        if step.index:
            raise KeyError("broken")
        return super().edit_prediction(step, out)


@pytest.mark.parametrize("guidance", [Zest(), Broken()])
def test_no_trace_is_left(pipe, guidance):
    things = [pipe, pipe.unet, pipe.vae, pipe.scheduler, *pipe.unet.modules()]
    draw(pipe)  # a pipeline keeps the settings of its latest call
    pipe.unet.requires_grad_(True).train()
    try:
        before = [dict(vars(thing)) for thing in things]
        bare = None if isinstance(guidance, Broken) else draw(pipe)
        with pytest.raises(KeyError) if bare is None else contextlib.nullcontext():
            with attach(pipe, [guidance], segments=SEGMENTS):
                draw(pipe)
        for thing, attributes in zip(things, before, strict=True):
            assert vars(thing).keys() == attributes.keys()
            assert "forward" not in vars(thing)
            assert "step" not in vars(thing)
        assert all(p.requires_grad and p.grad is None for p in pipe.unet.parameters())
        assert pipe.unet.training
    finally:
        pipe.unet.requires_grad_(False).eval()


def test_a_call_that_fails_does_not_spoil_the_next(pipe):
    guidance = Broken()
    with attach(pipe, [guidance, Zest()], segments=SEGMENTS, seeds=[5, 6]):
        with pytest.raises(KeyError, match="broken") as error:
            draw(pipe)
        assert str(where_of(error.value)) == "plugin broken, edit_prediction, step 1"
        guidance.edit_prediction = Watch.edit_prediction.__get__(guidance)
        assert torch.equal(draw(pipe), own_loop(pipe, [Zest()]))


def test_wrappers_of_others_may_come_off_later(pipe):
    calls = []

    def around(original, args, kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    bare = draw(pipe)
    with attach(pipe, [Zest()], segments=SEGMENTS):
        others = [Patch(pipe.unet, around), Patch(pipe, around, "encode_prompt")]
        assert not torch.equal(draw(pipe), bare)
    assert torch.equal(draw(pipe), bare)
    assert len(calls) == 8  # two runs with one text and three steps each
    for other in others:
        other.remove()
    assert torch.equal(draw(pipe), bare)
    assert "forward" not in vars(pipe.unet)
    assert "encode_prompt" not in vars(pipe)


def test_inference_mode_outside(pipe):
    guidances = [Zest(), Bright(), Fresh()]
    with attach(pipe, guidances, segments=SEGMENTS, seeds=[5, 6]):
        expected = draw(pipe)
        with torch.inference_mode():
            assert torch.equal(draw(pipe), expected)


def test_callbacks_are_kept_and_may_end_classifier_free_guidance(pipe):
    seen = []

    def end_guidance(pipe, index, timestep, given):
        seen.append(index)
        if index == 0:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    options = {
        "callback_on_step_end": end_guidance,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    bare = draw(pipe, **options)
    with attach(pipe, [Watch()]):
        assert torch.equal(draw(pipe, **options), bare)
    with attach(pipe, [Zest(stop=1.0)], segments=SEGMENTS):
        assert not torch.equal(draw(pipe, **options), bare)
    assert seen == [0, 1, 2] * 3


def test_a_lora_like_layer_is_in_what_is_guided():
    class Lora(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, layer.out_features, bias=False)

        def forward(self, x, *args, **kwargs):
            return self.layer(x) + self.up(self.down(x))

    pipe = tiny.sd_pipeline()
    plain = own_loop(pipe, [Zest()])
    torch.manual_seed(0)
    for site in find_sites(pipe.unet, "*.attn2"):
        attention = pipe.unet.get_submodule(site)
        attention.to_k = Lora(attention.to_k)
    expected = own_loop(pipe, [Zest()])
    with attach(pipe, [Zest()], segments=SEGMENTS, seeds=[5, 6]):
        got = draw(pipe)
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)


def test_ip_adapter_images_are_replayed():
    pipe = tiny.sd_pipeline()
    torch.manual_seed(0)
    for site in find_sites(pipe.unet, "*.attn2"):
        attention = pipe.unet.get_submodule(site)
        width = attention.to_q.in_features
        attention.set_processor(IPAdapterAttnProcessor2_0(width, 32, (4,), 0.5))
    pipe.unet.encoder_hid_proj = lambda embeds: [embeds[0]]
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    # One image's null and own embedding; the pipeline repeats them for each prompt's images.
    one = {"seeds": (5,), "ip_adapter_image_embeds": [torch.randn(2, 4, 32)]}
    other = {"seeds": (5,), "ip_adapter_image_embeds": [torch.randn(2, 4, 32)]}
    bare = draw(pipe, **one)
    with attach(pipe, [Watch()]):
        assert torch.equal(draw(pipe, **one), bare)
    with attach(pipe, [Zest(stop=1.0)], segments=SEGMENTS):
        guided = draw(pipe, **one)
        assert not torch.equal(guided, draw(pipe, **other))
    assert not torch.equal(guided, bare)


@pytest.mark.parametrize("guess", [False, True])
def test_controlnet_residuals_are_replayed(pipe, guess):
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    net.eval()
    controlled = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    options = {"image": torch.rand(1, 3, 32, 48).repeat(2, 1, 1, 1), "guess_mode": guess}
    bare = draw(controlled, **options)
    assert not torch.equal(bare, draw(pipe))
    with attach(controlled, [Watch()]):
        assert torch.equal(draw(controlled, **options), bare)
    with attach(controlled, [Zest()], segments=SEGMENTS) as attached:
        assert not torch.equal(draw(controlled, **options), bare)
    assert attached.account.acted("zest")


class Picky(Guidance):
    def accept(self, images):
        return images.mean((1, 2, 3)) > 0


class Own(Guidance):
    own_loop: ClassVar[bool] = True


@pytest.mark.parametrize("cls, why", [(Picky, "rejects"), (Own, "own loop")])
def test_what_needs_its_own_loop_is_refused_at_once(pipe, cls, why):
    with pytest.raises(GuidekitError, match=f"{why}.*guidekit.sample"):
        with attach(pipe, [cls()]):
            raise AssertionError("it was attached")


@pytest.mark.parametrize(
    "guidances, attached, called, message",
    [
        ([Zest()], {"segments": BLUE}, {}, "the layout's prompt is 'a blue square'"),
        ([Zest()], {"segments": BLUE.segments}, {}, "'blue' does not occur in the prompt"),
        ([Zest()], {"segments": [RED] * 3}, {}, "3 layouts for 2 prompts"),
        ([Zest()], {"segments": SEGMENTS, "seeds": [1]}, {}, "1 seeds for 2 images"),
        ([Zest()], {}, {}, "zest needs segments"),
        ([MultiDiffusion()], {"segments": SEGMENTS}, {}, "has not encoded"),
        ([ClassifierFree(cfg_scale=3.0)], {}, {"guidance_scale": 1.0}, "guidance_scale above 1"),
        ([ClassifierFree(rescale=0.5)], {}, {"guidance_rescale": 0.5}, "guidance_rescale"),
        ([Zest()], {"segments": SEGMENTS, "memory": "none"}, {}, "memory must be one of"),
        ([Bright()], {"cfg": 3.0}, {}, "does not combine null and cond with the scale 3"),
    ],
)
def test_what_cannot_work_is_refused(pipe, guidances, attached, called, message):
    with pytest.raises(GuidekitError, match=message):
        with attach(pipe, guidances, **attached):
            draw(pipe, **called)
    assert "encode_prompt" not in vars(pipe)
    assert "forward" not in vars(pipe.unet)


def test_phrases_with_prompt_embeds_are_refused(pipe):
    states = torch.randn(2, 77, 32)
    given = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": states,
        "negative_prompt_embeds": states.roll(1, 1),
    }
    with attach(pipe, [Zest()], segments=SEGMENTS):
        with pytest.raises(GuidekitError, match="prompt_embeds"):
            draw(pipe, **given)
    bare = draw(pipe, **given)
    with attach(pipe, [Bright()]):  # it reads no phrases
        assert not torch.equal(draw(pipe, **given), bare)


def test_one_denoiser_is_attached_once(pipe):
    with attach(pipe, [Zest()], segments=SEGMENTS):
        with pytest.raises(GuidekitError, match="attached already"):
            with attach(pipe, [Bright()]):
                pass
        assert not torch.equal(draw(pipe), _detached(pipe))


def _detached(pipe):
    """Images of the same weights without the attachment."""
    return draw(tiny.sd_pipeline())


def test_a_guidance_that_never_acts_is_warned_of(pipe):
    with attach(pipe, [Zest(start=0.9, stop=0.95)], segments=SEGMENTS):
        with pytest.warns(UserWarning, match="zest never acted"):
            draw(pipe)
