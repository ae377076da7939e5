"""Encoders of maps and maps of segments: what the bare pipeline draws when it is told the same."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tiny
from guidekit import Condition, Control, GuidekitError, LabelMap, LabelSet, Sampling, Segment
from guidekit.backbones.controls import load_control
from guidekit.backbones.segment_map import painted, pooled
from guidekit.testing.conditioners import map_encoder, segment_map, t2i_adapter
from guidekit_cfg import ClassifierFree
from guidekit_multidiffusion import MultiDiffusion
from guidekit_zest import Zest

SEEDS, CFG = [5, 6], 5.0
LABELS = LabelSet("five", ("a", "b", "c", "d", "e"))
IDS = torch.arange(5).repeat_interleave(7)[:32].expand(32, 32).contiguous()
MAPS = [LabelMap(ids, LABELS) for ids in (IDS, IDS.T.contiguous())]
HALVES = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
PROMPTS = ["a red circle", "a blue square on white"]
CONDITIONS = [
    Condition(prompt, "green", segments=(Segment(phrase, box),), map=own)
    for prompt, phrase, box, own in zip(
        PROMPTS, ("red circle", "blue square"), HALVES, MAPS, strict=True
    )
]


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@pytest.fixture(scope="module")
def encoder(pipe):
    return map_encoder(pipe, len(LABELS))


@pytest.fixture(scope="module")
def spatial(pipe):
    return segment_map(pipe)


def ours(pipe, controls, *guidances, conditions=CONDITIONS, **options):
    options = {"seeds": SEEDS, "steps": 3, "cfg": CFG} | options
    return Sampling(pipe, conditions, guidances, controls=controls, **options).finish().latents


def theirs(pipe, **told):
    """Latents of diffusers' own pipeline."""
    return pipe(
        num_inference_steps=3,
        guidance_scale=CFG,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        height=32,
        width=32,
        output_type="latent",
        **told,
    ).images


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_an_encoders_tokens_come_after_the_prompts(pipe, encoder, scale):
    words, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True, ["green"] * 2)
    with torch.no_grad():
        tokens = encoder(torch.stack([own.one_hot() for own in MAPS]))
        null = encoder(torch.zeros(2, 5, 32, 32))
    assert tokens.shape[:2] == (2, 17)
    tokens = torch.lerp(null, tokens, scale)
    expected = theirs(
        pipe,
        prompt_embeds=torch.cat([words, tokens], 1),
        negative_prompt_embeds=torch.cat([empty, null], 1),
    )
    found = ours(pipe, Control(encoder, scale=scale))
    assert torch.equal(found, expected)
    assert not torch.equal(found, ours(pipe, (), conditions=_without_maps()))


def _without_maps():
    return [replace(condition, map=None) for condition in CONDITIONS]


def test_channels_of_segments_are_a_further_convolution(pipe, spatial):
    """conv([W, V], [z, m]) = conv(W, z) + conv(V, m), in the conditional half of the batch."""
    model, prior = spatial
    phrases = [condition.segments[0].phrase for condition in CONDITIONS]
    with torch.no_grad():
        embeddings = prior(pooled(pipe, phrases))
    torch.testing.assert_close(embeddings.square().mean(1), torch.ones(2))
    maps = torch.zeros(2, 3, 16, 16)
    maps[0, :, :, :8], maps[1, :, :, 8:] = (
        embeddings[0, :, None, None],
        embeddings[1, :, None, None],
    )
    weight = model.unet.conv_in.weight
    own = F.conv2d(torch.cat([torch.zeros_like(maps), maps]), weight[:, 4:], padding=1)
    before = pipe.unet.conv_in.weight.data, pipe.unet.conv_in.bias.data
    pipe.unet.conv_in.weight.data = weight[:, :4]
    pipe.unet.conv_in.bias.data = model.unet.conv_in.bias.data
    handle = pipe.unet.conv_in.register_forward_hook(lambda module, args, out: out + own)
    try:
        expected = theirs(pipe, prompt=PROMPTS, negative_prompt=["green"] * 2)
    finally:
        handle.remove()
        pipe.unet.conv_in.weight.data, pipe.unet.conv_in.bias.data = before
    found = ours(model, Control(prior), conditions=_without_maps())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    silent = ours(model, Control(prior, scale=0.0), conditions=_without_maps())
    assert (silent - found).abs().max() > 0.01


def test_embeddings_are_painted_by_the_share_of_their_masks():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    masks = torch.tensor([[[1.0, 1.0, 0.5, 0.0]], [[0.0, 1.0, 0.0, 0.0]]])
    wanted = torch.tensor([[[1.0, 0.5, 0.5, 0.0]], [[0.0, 1.0, 0.0, 0.0]]])
    assert torch.equal(painted(embeddings, masks), wanted)


@pytest.mark.parametrize("kind", ["segments", "tokens"])
def test_two_scales_add_two_differences_to_the_null(pipe, encoder, spatial, kind):
    """After one step of DDIM latents are affine in the model's output."""
    model, control = (spatial[0], spatial[1]) if kind == "segments" else (pipe, encoder)
    nulls = [replace(c, prompt="green") for c in CONDITIONS]
    if kind == "segments":
        nulls, asked = ([replace(c, map=None) for c in own] for own in (nulls, CONDITIONS))
    else:
        asked = CONDITIONS
        empty = LabelMap(torch.full((32, 32), -1), LABELS)
        nulls = [replace(c, map=empty) for c in nulls]

    def drawn(conditions, scale=1.0, cfg=1.0, *guidances):
        given = Control(control, scale=scale)
        options = {"conditions": conditions, "steps": 1, "cfg": cfg, "scheduler": "ddim"}
        return ours(model, given, *guidances, **options)

    if kind == "segments":
        base, text, own = drawn(nulls, 0.0), drawn(asked, 0.0), drawn(nulls)
    else:
        base = drawn(nulls)
        text = drawn([replace(c, map=empty) for c in asked])
        own = drawn([replace(c, prompt="green") for c in asked])
    found = drawn(asked, 1.0, 3.0, ClassifierFree(control_scale=2.0))
    wanted = base + 3 * (text - base) + 2 * (own - base)
    assert (wanted - base).abs().max() > 0.004
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_an_adapter_is_silent_where_a_branch_has_no_controls(pipe):
    adapter = t2i_adapter(pipe)
    options = {"steps": 1, "scheduler": "ddim", "conditions": _without_maps()}
    given = Control(adapter, _checks())
    negatives = [replace(c, prompt="green") for c in options.pop("conditions")]
    base = ours(pipe, (), conditions=negatives, cfg=1.0, **options)
    text = ours(pipe, (), conditions=_without_maps(), cfg=1.0, **options)
    own = ours(pipe, given, conditions=negatives, cfg=1.0, **options)
    guidance = ClassifierFree(control_scale=2.0)
    found = ours(pipe, given, guidance, conditions=_without_maps(), cfg=3.0, **options)
    wanted = base + 3 * (text - base) + 2 * (own - base)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def _checks():
    return LabelMap(IDS, LabelSet("five", LABELS.classes, tuple((50 * i, 9, 9) for i in range(5))))


def test_a_control_scale_without_controls_is_refused(pipe):
    with pytest.raises(GuidekitError, match="control_scale is of controls; give --control"):
        ours(pipe, (), ClassifierFree(control_scale=2.0), conditions=_without_maps())
    with pytest.raises(GuidekitError, match="control_scale must be a finite number"):
        ClassifierFree(control_scale=-1.0)


def test_a_control_scale_without_a_null_branch_is_refused(pipe):
    given, asked = Control(t2i_adapter(pipe), _checks()), _without_maps()
    guidance = ClassifierFree(control_scale=2.0, cfg_scale=1.0)  # takes the run's null away
    with pytest.raises(GuidekitError, match="added to the null branch"):
        ours(pipe, given, guidance, conditions=asked, cfg=3.0)


def test_an_image_does_not_depend_on_its_batch(spatial):
    model, prior = spatial
    encoder = map_encoder(model, len(LABELS)).double()
    model.to(torch.float64)
    try:
        controls = [Control(encoder), Control(prior.double())]
        both = ours(model, controls)
        for i in range(2):
            alone = ours(model, controls, conditions=[CONDITIONS[i]], seeds=[SEEDS[i]])
            torch.testing.assert_close(alone[0], both[i], rtol=0, atol=1e-6)
    finally:
        model.to(torch.float32)
        prior.float()


def test_guidance_reads_the_prompts_columns_beside_an_encoders_tokens(pipe, encoder):
    zest = Zest(stop=1.0)
    options = {"conditions": CONDITIONS[:1], "seeds": SEEDS[:1]}
    run = Sampling(pipe, guidances=[zest], controls=[Control(encoder)], steps=2, cfg=CFG, **options)
    assert run.finish().account.acted("zest")
    assert not torch.equal(run.latents, ours(pipe, Control(encoder), **options, steps=2))


def test_windows_see_their_part_of_the_segments(spatial):
    """The left window sees a segment over all of it, the right one nothing."""
    model, prior = spatial
    seen = []
    handle = model.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 4:]))
    options = {"height": 32, "width": 64, "seeds": [5], "conditions": _without_maps()[:1]}
    ours(model, Control(prior), MultiDiffusion(window=16, stride=16), **options)
    handle.remove()
    flat = {float(x.std((1, 2)).max()) for rows in seen for x in rows}
    assert max(flat) < 1e-6
    assert {bool(x.any()) for rows in seen for x in rows} == {True, False}


def test_folders_are_loaded_and_draw_the_same(pipe, encoder, spatial, tmp_path):
    encoder.save_pretrained(tmp_path / "encoder")
    spatial[1].save_pretrained(tmp_path / "segments")
    again = load_control(tmp_path / "encoder")
    assert torch.equal(ours(pipe, Control(again)), ours(pipe, Control(encoder)))
    given = {"conditions": _without_maps()}
    found = ours(spatial[0], Control(tmp_path / "segments"), **given)
    assert torch.equal(found, ours(spatial[0], Control(spatial[1]), **given))


def test_what_does_not_fit_is_said_in_one_line(pipe, encoder, spatial):
    model, prior = spatial
    for text, own, controls, options in (
        ("makes? 3 channels beside the 4 of the latents", pipe, Control(prior), {}),
        ("the others are of a control, which --control", model, (), {}),
        ("reads the segments of the condition, not an image", model, Control(prior, _checks()), {}),
        ("needs segments: give --segment", model, Control(prior), {"conditions": [Condition("a")]}),
        ("no image and its condition no map", pipe, Control(encoder), {"conditions": ["a"]}),
        ("its texts have", pipe, Control(map_encoder(tiny.sdxl_pipeline(), 5)), {}),
    ):
        options = {"conditions": _without_maps()} | options
        seeds = SEEDS[: len(options["conditions"])]
        with pytest.raises(GuidekitError, match=text) as error:
            ours(own, controls, seeds=seeds, **options)
        assert "\n" not in str(error.value)
