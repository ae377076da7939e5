"""`attach` to pipelines with more than a prompt, and to what users do to their pipelines."""

from dataclasses import dataclass
from types import MethodType
from typing import ClassVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionGLIGENPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)

import tiny
from attaching import Watch
from guidekit import Guidance, Segment, attach, box_mask, sample
from guidekit.backbones.records import FAMILIES
from guidekit.errors import GuidekitError
from guidekit.taps import tap_attention
from guidekit.testing import conditioners, miniatures
from guidekit.testing.weights import randomised
from guidekit.toolbox import to_image
from guidekit_pag import PerturbedAttention
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest

LEFT = box_mask((0, 0, 0.5, 1))
SEGMENTS = (Segment("red circle", LEFT),)
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
HALF = torch.zeros(1, 1, 32, 32)
HALF[..., 16:] = 1


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(pipe, *without, **changed):
    return {k: v for k, v in pipe.components.items() if k not in without} | changed


def kontext():
    pipe = quiet(FluxKontextPipeline(**parts(tiny_flux())))
    pipe.default_sample_size = 16
    return pipe, {"image": IMAGE, "max_area": 32 * 32, "_auto_resize": False}


def tiny_flux():
    return miniatures.flux_pipeline()


def fill():
    torch.manual_seed(0)
    config = {k: v for k, v in tiny_flux().transformer.config.items() if k[0] != "_"}
    config |= {"in_channels": 3 * 16, "out_channels": 16}
    model = randomised(FluxTransformer2DModel(**config).eval())
    own = parts(tiny_flux(), "image_encoder", "feature_extractor", transformer=model)
    pipe = quiet(FluxFillPipeline(**own))
    pipe.default_sample_size = 16
    return pipe, {"image": IMAGE, "mask_image": HALF}


def unet(**config):
    torch.manual_seed(0)
    return randomised(UNet2DConditionModel(**miniatures.SD_UNET | config).eval())


def inpainting(channels=9):
    own = parts(tiny.sd_pipeline(), unet=unet(in_channels=channels))
    pipe = quiet(StableDiffusionInpaintPipeline(**own, requires_safety_checker=False))
    return pipe, {"image": IMAGE, "mask_image": HALF}


def distilled():
    own = parts(tiny.sd_pipeline(), unet=unet(time_cond_proj_dim=32))
    pipe = quiet(StableDiffusionPipeline(**own, requires_safety_checker=False))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe, {}


def refiner():
    own = parts(tiny.sdxl_pipeline(), "image_encoder", "feature_extractor")
    torch.manual_seed(0)
    config = miniatures.SDXL_UNET | {
        "cross_attention_dim": own["text_encoder_2"].config.hidden_size,
        "projection_class_embeddings_input_dim": 32 + 5 * 8,
    }
    own |= {"text_encoder": None, "tokenizer": None}
    own["unet"] = randomised(UNet2DConditionModel(**config).eval())
    pipe = StableDiffusionXLImg2ImgPipeline(
        **own, requires_aesthetics_score=True, add_watermarker=False
    )
    return quiet(pipe), {"image": IMAGE, "strength": 0.8, "height": None, "width": None}


def draw(pipe, **options):
    given = {"prompt": "a red circle", "num_inference_steps": 4, "height": 32, "width": 32}
    given |= {"output_type": "latent", "generator": torch.Generator().manual_seed(0)} | options
    return pipe(**{k: v for k, v in given.items() if v is not None}).images


def controlled(build=tiny.sd_pipeline, kind=StableDiffusionControlNetPipeline, count=1, **options):
    own = build()
    nets = [conditioners.control_net(own, seed) for seed in range(count)]
    more = {"requires_safety_checker": False} if build is tiny.sd_pipeline else {}
    pipe = kind(**parts(own), controlnet=nets if count > 1 else nets[0], **more)
    return quiet(pipe), {"image": [IMAGE] * count if count > 1 else IMAGE, **options}


def two_controls():
    return controlled(count=2, control_guidance_end=[0.5, 1.0])


def guessing():
    return controlled(guess_mode=True)


def controlled_xl():
    return controlled(tiny.sdxl_pipeline, StableDiffusionXLControlNetPipeline)


def adapted():
    own = tiny.sd_pipeline()
    adapter = conditioners.t2i_adapter(own)
    pipe = StableDiffusionAdapterPipeline(
        **parts(own, "image_encoder"), adapter=adapter, requires_safety_checker=False
    )
    return quiet(pipe), {"image": IMAGE}


def adapted_xl():
    own = tiny.sdxl_pipeline()
    adapter = conditioners.t2i_adapter(own)
    return quiet(StableDiffusionXLAdapterPipeline(**parts(own), adapter=adapter)), {"image": IMAGE}


def gligen():
    own = parts(tiny.sd_pipeline(), "image_encoder", unet=unet(attention_type="gated"))
    pipe = StableDiffusionGLIGENPipeline(**own, requires_safety_checker=False)
    boxes = {"gligen_phrases": ["red circle"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.9]]}
    return quiet(pipe), boxes | {"gligen_scheduled_sampling_beta": 0.5}


PIPELINES = [kontext, fill, inpainting, distilled, refiner]
FULL = [two_controls, guessing, controlled_xl, adapted, adapted_xl]
CONTROLLED = [controlled, gligen, *(pytest.param(b, marks=pytest.mark.full) for b in FULL)]


@pytest.mark.parametrize("build", PIPELINES + CONTROLLED)
def test_pipelines_with_more_than_a_prompt_are_guided(build):
    pipe, options = build()
    bare = draw(pipe, **options)
    Watch.kept.clear()
    with attach(pipe, [Watch()]):
        torch.testing.assert_close(draw(pipe, **options), bare, rtol=1e-4, atol=1e-4)
    assert Watch.kept
    for guidance in (Zest(stop=1.0), PaintWithWords(scale=3.0)):
        with attach(pipe, [guidance], segments=SEGMENTS) as attached:
            assert (draw(pipe, **options) - bare).abs().max() > 1e-3
        assert attached.account.acted(guidance.name)
    assert torch.equal(draw(pipe, **options), bare)


@pytest.mark.parametrize("build", CONTROLLED)
def test_what_stands_beside_the_denoiser_acts_in_guided_steps(build):
    """Guided with the control is another image than guided without it; scale 0 is the pipeline."""
    pipe, options = build()
    bare = draw(pipe, **options)
    with attach(pipe, [Zest(scale=0.0)], segments=SEGMENTS):
        assert torch.equal(draw(pipe, **options), bare)
    name = {"adapter": "adapter_conditioning_scale"}.get(
        next((k for k in ("adapter", "controlnet") if hasattr(pipe, k)), ""),
        "controlnet_conditioning_scale",
    )
    off = {name: [0.0] * len(options["image"]) if isinstance(options.get("image"), list) else 0.0}
    if build is gligen:
        off = {"gligen_scheduled_sampling_beta": 0.0}
    with attach(pipe, [PaintWithWords(scale=3.0)], segments=SEGMENTS):
        guided, without = draw(pipe, **options), draw(pipe, **options | off)
    assert (guided - bare).abs().max() > 1e-3
    assert (guided - without).abs().max() > 1e-3


def test_self_attention_beside_another_image_is_edited():
    pipe, options = kontext()
    bare = draw(pipe, **options)
    with attach(pipe, [PerturbedAttention(scale=2.0)]) as attached:
        assert not torch.equal(draw(pipe, **options), bare)
    assert attached.account.acted("pag")


def test_pixels_of_another_image_are_not_rows():
    flux, sd3 = (next(f for f in FAMILIES if f.name == name) for name in ("flux", "sd3"))
    assert flux.beside(0) is flux
    assert flux.beside(16).rows(5 + 64 + 16, 5) == slice(5, 69)
    assert sd3.rows(69, 5) == slice(0, 64)


def test_maps_beside_another_image_are_the_softmax_of_the_pixels():
    """The whole softmax of the first block, cut by hand out of one call of the pipeline."""
    pipe, options = kontext()
    site = "transformer_blocks.0.attn"
    guidance, kept = Zest(sites=(site,)), []

    def keep(call):
        kept.append((call.query, call.key))

    with tap_attention(pipe.transformer, keep, [site]):
        draw(pipe, num_inference_steps=1, **options)
    query, key = kept[0]
    p = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)
    with attach(pipe, [guidance], segments=SEGMENTS) as attached:
        draw(pipe, num_inference_steps=1, **options)
    step, read = attached.step, attached.run.reads.asked[0].read
    columns = read.weights.ne(0).any(0).any(-1).nonzero().flatten().tolist()
    count = read.weights.shape[1]
    h, w = read.sites[site]
    expected = p[:, count : count + h * w][..., columns].sum(-1).unflatten(-1, (h, w))
    found = step.cond.attention(read)[site][:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "build, message",
    [
        (kontext, r"FluxKontextPipeline draws from an image \(image\)"),
        (fill, r"FluxFillPipeline draws from an image"),
        (inpainting, "StableDiffusionInpaintPipeline draws from an image"),
        (refiner, "StableDiffusionXLImg2ImgPipeline draws from an image"),
        (distilled, "time_cond_proj_dim"),
    ],
)
def test_the_own_loop_names_attach_before_it_draws(build, message):
    with pytest.raises(GuidekitError, match=f"{message}.*guidekit.attach"):
        sample(build()[0], "a red circle", seeds=[0], steps=2)


def test_the_own_loop_refuses_what_the_model_alone_says():
    pipe = tiny.sd_pipeline()
    pipe.unet = unet(in_channels=8)
    with pytest.raises(
        GuidekitError, match="reads 8 channels, the latents have 4.*guidekit.attach"
    ):
        sample(pipe, "a red circle", seeds=[0], steps=2)
    pipe = tiny.sd_pipeline()
    pipe.unet.encoder_hid_proj = torch.nn.Identity()  # as a loaded IP-Adapter leaves it
    with pytest.raises(GuidekitError, match="IP-Adapter is loaded.*guidekit.attach"):
        sample(pipe, "a red circle", seeds=[0], steps=2)
    pipe = tiny.sd_pipeline()
    twin = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(GuidekitError, match="StableDiffusionImg2ImgPipeline draws from an image"):
        sample(twin, "a red circle", seeds=[0], steps=2)


@pytest.fixture
def pipe():
    return tiny.sd_pipeline()


def test_a_users_wrapper_of_the_class_round_step(pipe, monkeypatch):
    plain, seen = DDIMScheduler.step, []
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with attach(pipe, [Zest(stop=1.0)], segments=SEGMENTS):
        expected = draw(pipe)

    def step(self, *args, **kwargs):
        seen.append(int(args[1]))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DDIMScheduler, "step", step)
    with attach(pipe, [Zest(stop=1.0)], segments=SEGMENTS):
        assert torch.equal(draw(pipe), expected)
    assert set(pipe.scheduler.timesteps.tolist()) <= set(seen)


def test_a_users_wrapper_of_the_instance_round_step(pipe):
    with attach(pipe, [Zest(stop=1.0)], segments=SEGMENTS):
        expected = draw(pipe)
    plain, seen = pipe.scheduler.step, []

    def step(self, *args, **kwargs):
        seen.append(int(args[1]))
        return plain(*args, **kwargs)

    pipe.scheduler.step = MethodType(step, pipe.scheduler)
    with attach(pipe, [Zest(stop=1.0)], segments=SEGMENTS):
        assert torch.equal(draw(pipe), expected)
    assert seen == pipe.scheduler.timesteps.tolist()


@dataclass(kw_only=True)
class Again(Watch):
    """Repeats steps as often as it is told."""

    times: int = 1

    def repeats(self, step):
        return self.times


def test_repeats_are_refused_where_there_are_some(pipe):
    bare = draw(pipe)
    with attach(pipe, [Again()]):
        assert torch.equal(draw(pipe), bare)
    with attach(pipe, [Again(times=2)]):
        with pytest.raises(GuidekitError, match="again repeats steps.*guidekit.sample"):
            draw(pipe)


def test_cfg_1_is_taken_where_it_changes_nothing(pipe):
    with attach(pipe, [Zest(stop=1.0)], segments=SEGMENTS):
        expected = draw(pipe, guidance_scale=1.0)
    with attach(pipe, [Zest(stop=1.0)], segments=SEGMENTS, cfg=1.0):
        assert torch.equal(draw(pipe, guidance_scale=1.0), expected)
        with pytest.raises(GuidekitError, match="cfg is 1, and .* for null and cond"):
            draw(pipe, guidance_scale=5.0)
    with pytest.raises(GuidekitError, match="cfg is the call's guidance_scale"):
        with attach(pipe, [Zest()], cfg=-1.0):
            pass


@dataclass(kw_only=True)
class Near(Guidance):
    """Pulls the decoded x0 to the reference image."""

    scale: float = 5.0
    reads_image: ClassVar[bool] = True

    def energy(self, step):
        wanted = [c.image.pixels(32) for c in step.run.conditions]
        return (step.decode(step.x0) - torch.stack(wanted)).square().mean((1, 2, 3))


def test_a_reference_image(pipe):
    image = to_image(IMAGE[0])
    bare = draw(pipe)
    with attach(pipe, [Near()], image=image) as attached:
        assert not torch.equal(draw(pipe), bare)
    assert [c.image is not None for c in attached.run.conditions] == [True]
    with pytest.raises(GuidekitError, match="no guidance here reads an image"):
        with attach(pipe, [Zest()], image=image):
            pass


def test_columns_by_hand_beside_prompt_embeds(pipe):
    states, null = pipe.encode_prompt("a red circle", "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": states, "negative_prompt_embeds": null}
    with attach(pipe, [Zest(stop=1.0)], segments=SEGMENTS):
        expected = draw(pipe)
        with pytest.raises(GuidekitError, match="prompt_embeds.*tokens"):
            draw(pipe, **given)
    by_hand = (Segment("red circle", LEFT, tokens=(2, 3)),)
    with attach(pipe, [Zest(stop=1.0)], segments=by_hand):
        assert torch.equal(draw(pipe, **given), expected)
