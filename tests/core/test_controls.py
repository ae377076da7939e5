"""Controls beside the denoiser: diffusers' own pipelines bit for bit, windows, guess mode."""

import inspect

import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import tiny
from guidekit import (
    Condition,
    Control,
    GuidekitError,
    LabelMap,
    LabelSet,
    Sampling,
    Segment,
    attach,
)
from guidekit.backbones.control_images import control_pixels
from guidekit.backbones.controls import load_control
from guidekit.branches import windowed
from guidekit.testing import miniatures
from guidekit.testing.conditioners import control_net, t2i_adapter
from guidekit_multidiffusion import MultiDiffusion
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest

CONDITIONS = [Condition("a red circle", "blue"), Condition("a blue square on white", "green")]
SEEDS, STEPS, CFG = [5, 6], 4, 5.0
NOISE = torch.Generator().manual_seed(3)
ONE, OTHER = (
    Image.fromarray((torch.rand(32, 32, 3, generator=NOISE) * 255).byte().numpy()) for _ in range(2)
)
PIPES = {"sd": tiny.sd_pipeline, "sdxl": tiny.sdxl_pipeline}
NETS = {"sd": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}
ADAPTERS = {"sd": StableDiffusionAdapterPipeline, "sdxl": StableDiffusionXLAdapterPipeline}
SEGMENTS = (Segment("red circle", (0, 0, 0.5, 1)),)


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.full)])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    return PIPES[family]()


def parts(pipe, kind):
    """The components that a pipeline of another kind takes."""
    taken = inspect.signature(kind).parameters
    return {name: part for name, part in pipe.components.items() if name in taken}


def theirs(pipe, kind, cfg=CFG, steps=STEPS, **options):
    """Images of diffusers' pipeline with controls."""
    model = {k: options.pop(k) for k in ("controlnet", "adapter") if k in options}
    more = {} if "XL" in kind.__name__ else {"requires_safety_checker": False}
    whole = kind(**parts(pipe, kind), **model, **more)
    whole.set_progress_bar_config(disable=True)
    out = whole(
        [c.prompt for c in CONDITIONS],
        negative_prompt=[c.negative for c in CONDITIONS],
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=steps,
        guidance_scale=cfg,
        height=32,
        width=32,
        output_type="latent",
        **options,
    )
    return out.images


def ours(pipe, controls, *guidances, conditions=CONDITIONS, cfg=CFG, **options):
    options = {"seeds": SEEDS, "steps": STEPS, "cfg": cfg} | options
    return Sampling(pipe, conditions, guidances, controls=controls, **options).finish().latents


@pytest.mark.parametrize(
    "options, scale, window",
    [
        ({}, 1.0, {}),
        pytest.param({"controlnet_conditioning_scale": 0.3}, 0.3, {}, marks=pytest.mark.full),
        (
            {"control_guidance_start": 0.25, "control_guidance_end": 0.75},
            1.0,
            {"start": 0.25, "stop": 0.75},
        ),
        ({"guess_mode": True}, 1.0, {"guess": True}),
    ],
)
def test_a_controlnet_is_diffusers_own(pipe, family, options, scale, window):
    net = control_net(pipe)
    expected = theirs(pipe, NETS[family], controlnet=net, image=[ONE] * 2, **options)
    found = ours(pipe, Control(net, ONE, scale, **window))
    assert torch.equal(found, expected)
    assert not torch.equal(found, ours(pipe, ()))


def test_guess_mode_without_a_null_branch(pipe, family):
    net = control_net(pipe)
    given = {"controlnet": net, "image": [ONE] * 2, "guess_mode": True}
    expected = theirs(pipe, NETS[family], cfg=1.0, **given)
    assert torch.equal(ours(pipe, Control(net, ONE, guess=True), cfg=1.0), expected)


def test_two_controlnets_are_diffusers_own(pipe, family):
    nets = [control_net(pipe), control_net(pipe, 1)]
    expected = theirs(
        pipe,
        NETS[family],
        controlnet=nets,
        image=[ONE, OTHER],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.25],
        control_guidance_end=[0.5, 1.0],
    )
    controls = [Control(nets[0], ONE, 0.7, 0.0, 0.5), Control(nets[1], OTHER, 0.4, 0.25)]
    assert torch.equal(ours(pipe, controls), expected)


def test_one_adapter_and_two_are_diffusers_own(pipe, family):
    nets = [t2i_adapter(pipe), t2i_adapter(pipe, 1)]
    given = {"adapter": nets[0], "image": [ONE] * 2, "adapter_conditioning_scale": 0.6}
    expected = theirs(pipe, ADAPTERS[family], **given)
    assert torch.equal(ours(pipe, Control(nets[0], ONE, 0.6)), expected)
    assert not torch.equal(expected, ours(pipe, ()))
    both = {"adapter": MultiAdapter(nets), "adapter_conditioning_scale": [0.6, 0.2]}
    expected = theirs(pipe, ADAPTERS[family], image=[[ONE] * 2, [OTHER] * 2], **both)
    controls = [Control(nets[0], ONE, 0.6), Control(nets[1], OTHER, 0.2)]
    assert torch.equal(ours(pipe, controls), expected)


def test_an_adapter_may_end_a_step_before_a_controlnet():
    """diffusers cuts 50 x 0.58 = 28.999... to whole steps for one, asks each for the other."""
    pipe = tiny.sd_pipeline()
    for model, count in ((t2i_adapter(pipe), 28), (control_net(pipe), 29)):
        acting = [Control(model, stop=0.58).acts(i, 50) for i in range(50)]
        assert acting == [True] * count + [False] * (50 - count)


@pytest.mark.full
@pytest.mark.parametrize("steps, stop", [(STEPS, 0.5), (50, 0.58)])
def test_an_adapter_stops_where_diffusers_stops(steps, stop):
    pipe = tiny.sdxl_pipeline()
    adapter = t2i_adapter(pipe)
    given = {"adapter": adapter, "image": [ONE] * 2, "adapter_conditioning_factor": stop}
    expected = theirs(pipe, StableDiffusionXLAdapterPipeline, steps=steps, **given)
    assert torch.equal(ours(pipe, Control(adapter, ONE, stop=stop), steps=steps), expected)
    assert not torch.equal(expected, ours(pipe, Control(adapter, ONE), steps=steps))


@pytest.mark.full
def test_scale_0_is_no_control_and_both_kinds_go_together(pipe):
    net, adapter = control_net(pipe), t2i_adapter(pipe)
    plain = ours(pipe, ())
    assert torch.equal(ours(pipe, [Control(net, ONE, 0.0), Control(adapter, ONE, 0.0)]), plain)
    both = ours(pipe, [Control(net, ONE), Control(adapter, OTHER)])
    for alone in (Control(net, ONE), Control(adapter, OTHER)):
        assert not torch.equal(ours(pipe, alone), both)


@pytest.fixture(scope="module")
def sd():
    return tiny.sd_pipeline()


def test_an_image_does_not_depend_on_its_batch(sd):
    sd = sd.__class__(**sd.components, requires_safety_checker=False).to(torch.float64)
    net = control_net(sd).double()
    maps = [
        LabelMap(torch.full((32, 32), i), LabelSet("two", ("a", "b"), ((255, 0, 0), (0, 0, 255))))
        for i in range(2)
    ]
    own = [Condition(c.prompt, c.negative, map=m) for c, m in zip(CONDITIONS, maps, strict=True)]
    both = ours(sd, Control(net), conditions=own)
    for i in range(2):
        alone = ours(sd, Control(net), conditions=[own[i]], seeds=[SEEDS[i]])
        torch.testing.assert_close(alone[0], both[i], rtol=0, atol=1e-6)
    sd.to(torch.float32)


def test_windows_see_their_part_of_the_image(sd):
    """A control that sees the left half in black and the right in white, in windows of each."""
    halves = Image.new("RGB", (64, 32), "white")
    halves.paste("black", (0, 0, 32, 32))
    net = control_net(sd)
    seen = []
    handle = net.controlnet_cond_embedding.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    guidance = MultiDiffusion(window=16, stride=16)
    options = {"height": 32, "width": 64, "conditions": [CONDITIONS[0]], "seeds": [5]}
    ours(sd, Control(net, halves), guidance, **options)
    handle.remove()
    assert all(pixels.shape[-2:] == (32, 32) for pixels in seen)
    rows = torch.cat(seen)
    assert {float(p.min()) == float(p.max()) for p in rows} == {True}
    assert {float(p.mean()) for p in rows} == {0.0, 1.0}


def test_one_hot_maps_go_to_controls_of_classes(sd):
    labels = LabelSet("five", ("a", "b", "c", "d", "e"))
    ids = torch.arange(5).repeat_interleave(7)[:32].expand(32, 32).contiguous()
    net = control_net(sd, channels=5)
    shown = []
    net.controlnet_cond_embedding.register_forward_pre_hook(lambda m, args: shown.append(args[0]))
    own = [Condition("a red circle", map=LabelMap(ids, labels))]
    ours(sd, Control(net), conditions=own, seeds=[5])
    assert torch.equal(shown[0][-1].argmax(0), ids)
    with pytest.raises(GuidekitError, match="reads 5 channels, one for a class"):
        ours(sd, Control(net, ONE))


def test_maps_of_another_size_make_no_third_class(sd):
    """Nearest neighbour: what a control sees of a small map has its own colours alone."""
    colours = ((255, 0, 0), (0, 0, 255))
    labels = LabelSet("two", ("a", "b"), colours)
    ids = (torch.arange(10) % 3 == 0).long().expand(10, 10).contiguous()
    net = control_net(sd)
    shown = []
    net.controlnet_cond_embedding.register_forward_pre_hook(lambda m, args: shown.append(args[0]))
    small = LabelMap(ids, labels)
    for control in (Control(net), Control(net, small.coloured())):
        condition = Condition("a red circle", map=small if control.image is None else None)
        ours(sd, control, conditions=[condition], seeds=[5])
        found = {tuple(c) for c in (shown[-1][0].flatten(1).T * 255).round().int().tolist()}
        assert found == set(colours)


def test_grey_images_are_resized_as_diffusers_does():
    """Edges and depth are grey, and so are maps in few greys: nothing tells them apart."""
    values = (torch.arange(100).reshape(10, 10) % 3 == 0).byte() * 255
    image = Image.fromarray(values.numpy())
    processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
    (expected,) = processor.preprocess(image, 32, 32)
    assert torch.equal(control_pixels(image, 3, (32, 32)), expected)


@pytest.mark.parametrize(
    "build, kind, name, strength",
    [
        (control_net, StableDiffusionControlNetPipeline, "controlnet", "controlnet"),
        (t2i_adapter, StableDiffusionAdapterPipeline, "adapter", "adapter"),
    ],
)
def test_guidance_beside_a_control_is_that_of_attach(sd, build, kind, name, strength):
    """Zest too where the control does not depend on z, which attach takes as given."""
    model = build(sd)
    condition = Condition("a red circle", segments=SEGMENTS)
    whole = kind(**parts(sd, kind), **{name: model}, requires_safety_checker=False)
    whole.set_progress_bar_config(disable=True)
    given = {"image": ONE, f"{strength}_conditioning_scale": 0.5}
    for make in (lambda: PaintWithWords(scale=3.0), lambda: Zest(stop=1.0))[: 1 + (name[0] == "a")]:
        with attach(whole, make(), segments=SEGMENTS) as attached:
            expected = whole(
                "a red circle",
                num_inference_steps=STEPS,
                guidance_scale=CFG,
                generator=[torch.Generator().manual_seed(5)],
                height=32,
                width=32,
                output_type="latent",
                **given,
            ).images
        assert attached.account.acted(make().name)
        found = ours(sd, Control(model, ONE, 0.5), make(), conditions=[condition], seeds=[5])
        assert torch.equal(found, expected)


def test_folders_are_loaded_and_replays_equal(sd, tmp_path):
    for model in (control_net(sd), t2i_adapter(sd)):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        again = load_control(folder)
        assert type(again) is type(model)
        assert not again.training
        assert torch.equal(ours(sd, Control(folder, ONE)), ours(sd, Control(model, ONE)))


def test_half_precision_files_alone_are_enough(sd, tmp_path):
    control_net(sd).half().save_pretrained(tmp_path, variant="fp16")
    assert load_control(tmp_path, dtype=torch.float32).dtype == torch.float32


def refused(text, *args, **options):
    with pytest.raises(GuidekitError, match=text) as error:
        ours(*args, **options)
    assert "\n" not in str(error.value)


def test_what_cannot_work_is_refused(sd, tmp_path):
    net = control_net(sd)
    refused("takes no controls", miniatures.dit_pipeline(), Control(net, ONE))
    xl = tiny.sdxl_pipeline()
    refused("ControlNet for another model: its", sd, Control(control_net(xl), ONE))
    other = ControlNetModel.from_unet(sd.unet, conditioning_embedding_out_channels=(16, 16, 16, 32))
    refused("makes an image 8 times smaller, this model's", sd, Control(other, ONE))
    refused("T2I-Adapter for another model", sd, Control(t2i_adapter(xl), ONE))
    refused("no image and its condition no map", sd, Control(net))
    refused(
        "64x32, of another shape than 32x32; crop", sd, Control(net, Image.new("RGB", (64, 32)))
    )
    with pytest.raises(GuidekitError, match="control image nowhere.png: no such file"):
        Control(net, "nowhere.png")
    refused("a control's model is a", sd, Control(sd.unet, ONE))
    refused("controls are guidekit.Control", sd, [net])
    labels = LabelSet("two", ("a", "b"))
    lost = [Condition("a red circle", map=LabelMap(torch.zeros(4, 4).long(), labels))]
    refused("nothing here reads a label map", sd, (), conditions=lost, seeds=[0])
    refused("has no palette", sd, Control(net), conditions=lost, seeds=[0])
    other = LabelSet("other", ("b", "a"))
    told = Control(control_net(sd, channels=2), labels=other)
    refused("and the control reads 'other' with 2", sd, told, conditions=lost, seeds=[0])
    refused("no control 'nowhere'", sd, Control("nowhere", ONE))
    refused("is not in the hub's cache", sd, Control("some/where", ONE))
    for numbers, text in (({"scale": float("nan")}, "finite"), ({"start": 0.5, "stop": 0.5}, "<")):
        with pytest.raises(GuidekitError, match=text):
            Control(net, ONE, **numbers)


def test_pickles_and_other_folders_are_refused(sd, tmp_path):
    control_net(sd).save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(GuidekitError, match="is a pickle.*ControlNetModel as K; K.from_pretrained"):
        load_control(tmp_path / "pickle")
    sd.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(GuidekitError, match="AutoencoderKL; controls are ControlNetModel and"):
        load_control(tmp_path / "vae")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GuidekitError, match="has no config.json"):
        load_control(tmp_path / "empty")


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_control_without_safetensors_says_how_to_convert(sd, tmp_path, monkeypatch, capfd, place):
    """What a download of safetensors leaves of a control that has a pickle alone."""
    folder = tmp_path / "models--owner--seg/snapshots/0"
    t2i_adapter(sd).save_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "models--owner--seg/refs").mkdir()
    (tmp_path / "models--owner--seg/refs/main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    with pytest.raises(GuidekitError, match="has no safetensors.*run code") as error:
        load_control(folder if place == "folder" else "owner/seg")
    assert capfd.readouterr().err == ""
    repo, own = ("OWNER/NAME", str(folder)) if place == "folder" else ("owner/seg", "seg")
    line = str(error.value)
    assert f'hf download {repo} --local-dir {own} && python -c "from diffusers import T2I' in line
    assert "\n" not in line
    # The line does what it says.
    t2i_adapter(sd).save_pretrained(own, safe_serialization=False)
    exec(line[line.index("from diffusers") : line.rindex('"')])
    assert type(load_control(own)) is T2IAdapter


def test_a_window_past_the_right_edge_goes_on_at_the_left():
    x = torch.arange(12.0).reshape(1, 1, 2, 6)
    assert windowed(x, 0, 4, 2, 4).tolist() == [[[[4, 5, 0, 1], [10, 11, 6, 7]]]]
    assert torch.equal(windowed(x, 1, 1, 1, 3), x[..., 1:, 1:4])
