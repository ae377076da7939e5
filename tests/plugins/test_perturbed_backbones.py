"""The guiders on transformers and pixel UNets: equal to diffusers where it has them, all acting."""

import copy

import pytest
import torch
from diffusers import (
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionXLPAGPipeline,
)

import tiny
from drawing import draw, draw_family, transformer
from guidekit import attach, tap_attention, tap_blocks
from guidekit.backbones.records import family_of
from guidekit.bases.perturbed import layers, self_attention
from guidekit.errors import GuidekitError
from guidekit_apg import AdaptiveProjected
from guidekit_autoguidance import Autoguidance
from guidekit_pag import PerturbedAttention
from guidekit_seg import SmoothedEnergy
from guidekit_slg import SkipLayer

FAMILIES = ("sd3", "flux", "pixart")
PERTURBED = {
    "pag": PerturbedAttention(),
    "seg": SmoothedEnergy(),
    "seg, finite": SmoothedEnergy(blur=1.0),
    "slg": SkipLayer.example(),
    "autoguidance": Autoguidance(dropout=0.3),
}
CELLS = [(family, name) for family in FAMILIES for name in PERTURBED]


def guided(family, *guidances, pipe=None, **options):
    """Images and the attachment of one guided call."""
    cfg = 5.0 if family == "pixart" else None
    with attach(pipe or transformer(family), guidances, cfg=cfg) as attached:
        images = draw_family(family, pipe, **options)
    return images, attached


@pytest.mark.parametrize(("family", "name"), CELLS)
def test_every_cell_acts(family, name):
    images, attached = guided(family, PERTURBED[name])
    bare = draw_family(family)
    assert torch.isfinite(images).all()
    assert (images - bare).abs().max() > 1e-5
    assert attached.account.acted(PERTURBED[name].name)


@pytest.mark.parametrize("family", ["sd3", "pixart"])
def test_apg_acts(family):
    images, _ = guided(family, AdaptiveProjected(bound=1.0))
    assert torch.isfinite(images).all()
    assert (images - draw_family(family)).abs().max() > 1e-4


def test_apg_says_that_flux_has_nothing_to_adapt():
    with pytest.raises(GuidekitError, match="changes classifier-free guidance, and cfg is 1"):
        guided("flux", AdaptiveProjected())


def in_theirs(cls, pipe, **options):
    """diffusers' PAG pipeline on copies of the models: it leaves its processors behind."""
    parts = {k: copy.deepcopy(v) for k, v in pipe.components.items() if v is not None}
    theirs = cls(**parts, **options)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def test_pag_is_that_of_sd3():
    theirs = in_theirs(
        StableDiffusion3PAGPipeline, transformer("sd3"), pag_applied_layers="blocks.1"
    )
    expected = draw_family("sd3", theirs, pag_scale=2.0)
    images, _ = guided("sd3", PerturbedAttention(scale=2.0, sites="transformer_blocks.1.attn"))
    assert (images - expected).abs().max() < 1e-5
    assert (images - draw_family("sd3")).abs().max() > 1e-4


def test_pag_is_that_of_pixart():
    pipe = in_theirs(PixArtSigmaPipeline, transformer("pixart"))
    theirs = in_theirs(PixArtSigmaPAGPipeline, pipe, pag_applied_layers="blocks.1")
    expected = draw_family("pixart", theirs, pag_scale=2.0)
    images, _ = guided("pixart", PerturbedAttention(scale=2.0), pipe=pipe)
    assert (images - expected).abs().max() < 1e-5
    assert (images - draw_family("pixart", pipe)).abs().max() > 1e-4


def test_pag_is_that_of_sdxl():
    pipe = tiny.sdxl_pipeline()
    theirs = in_theirs(StableDiffusionXLPAGPipeline, pipe, add_watermarker=False)
    expected = draw(theirs, pag_scale=2.0)
    with attach(pipe, [PerturbedAttention(scale=2.0)]):
        images = draw(pipe)
    assert (images - expected).abs().max() < 1e-5
    assert (images - draw(pipe)).abs().max() > 1e-4


def test_skipping_is_sd3_s_own():
    expected = draw_family(
        "sd3",
        skip_guidance_layers=[1],
        skip_layer_guidance_scale=2.0,
        skip_layer_guidance_start=-1.0,
        skip_layer_guidance_stop=1.0,
    )
    skip = SkipLayer(scale=2.0, sites="transformer_blocks.1", start=0.0, stop=1.0)
    images, _ = guided("sd3", skip)
    assert (images - expected).abs().max() < 1e-5
    assert (images - draw_family("sd3")).abs().max() > 1e-4


@pytest.mark.parametrize("place", ["transformer_blocks", "single_transformer_blocks"])
def test_skipping_is_flux_without_the_block(place):
    """To the last digits of float64: both branches ride in one call, whose products round by its
    number of rows, and the block that is there takes rows apart where the other model has none.
    """
    pipe = copy.deepcopy(transformer("flux")).to(torch.float64)
    without = copy.deepcopy(pipe)
    del getattr(without.transformer, place)[0]
    skip, options = SkipLayer(sites=f"{place}.0", start=0.0, stop=1.0), {"num_inference_steps": 1}
    _, attached = guided("flux", skip, pipe=pipe, **options)
    _, other = guided("flux", SkipLayer.example(), pipe=without, **options)
    perturbed = attached.step.evals[skip.name].out
    assert perturbed.dtype == torch.float64
    torch.testing.assert_close(perturbed, other.step.cond.out, rtol=0, atol=1e-13)
    assert (perturbed - attached.step.cond.out).abs().max() > 1e-4


def watched(family, guidance, site):
    """The step, and query, key and mask of a site in the cond and in the perturbed branch."""
    seen = {}

    def keep(branch, call):
        logits = call.query @ call.key.mT * (call.scale or call.query.shape[-1] ** -0.5)
        seen[branch.name] = logits if call.mask is None else logits + call.mask

    class Watching(type(guidance)):
        def touches(self, branch):
            return branch.name in ("cond", self.name)

        def edit_attention(self, step, branch, call):
            if branch.name == self.name:
                super().edit_attention(step, branch, call)
            keep(branch, call)

    watching = Watching(sites=site)
    guided(family, watching, num_inference_steps=1)
    return seen["cond"], seen[watching.name]


JOINT = {
    "sd3": ("transformer_blocks.0.attn", slice(0, -101)),  # 77 of CLIP and 24 of T5 at the end
    "flux": ("single_transformer_blocks.0.attn", slice(24, None)),
}


@pytest.mark.parametrize("family", JOINT)
def test_pag_shuts_other_pixels_and_nothing_else(family):
    site, pixels = JOINT[family]
    plain, perturbed = watched(family, PerturbedAttention(), site)
    p = perturbed[:, :, pixels, pixels].softmax(-1)
    assert p.shape[-1] == 8 * 12
    assert torch.equal(p, torch.eye(96).expand_as(p))
    perturbed[:, :, pixels, pixels] = plain[:, :, pixels, pixels]
    assert torch.equal(perturbed, plain)


@pytest.mark.parametrize("family", JOINT)
def test_seg_blurs_the_logits_of_pixels_and_nothing_else(family):
    site, pixels = JOINT[family]
    plain, perturbed = watched(family, SmoothedEnergy(), site)
    expected = plain.clone()
    expected[:, :, pixels] = plain[:, :, pixels].mean(2, keepdim=True)
    torch.testing.assert_close(perturbed, expected, rtol=1e-4, atol=1e-5)
    assert (perturbed - plain).abs().max() > 1e-3


def test_dropout_of_1_skips_every_layer_of_sd3():
    _, dropped = guided("sd3", Autoguidance(dropout=1.0), num_inference_steps=1)
    every = SkipLayer(sites="transformer_blocks.*", start=0.0, stop=1.0)
    _, skipped = guided("sd3", every, num_inference_steps=1)
    assert torch.equal(dropped.step.evals["autoguidance"].out, skipped.step.evals["slg"].out)


def test_the_middle_of_a_transformer_is_the_default():
    _, attached = guided("flux", PerturbedAttention(), SkipLayer.example(), num_inference_steps=1)
    first, second = attached.run.guidances
    assert attached.run.reads.all_sites(first) == ["single_transformer_blocks.0.attn"]
    assert attached.run.reads.all_sites(second) == ["single_transformer_blocks.0"]


def output(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return out[0] if isinstance(out, tuple) else out.sample


@pytest.mark.parametrize("name", tiny.MODELS)
def test_each_layer_of_every_family_can_be_skipped(name):
    model, inputs, _ = tiny.MODELS[name]()
    before = output(model, inputs)
    for layer in layers(model):
        with tap_blocks(model, lambda call: call.skip(), layer):
            assert not torch.allclose(output(model, inputs), before), layer


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if name != "sana"])
def test_each_self_attention_of_every_family_can_be_perturbed(name):
    model, inputs, _ = tiny.MODELS[name]()
    family, before = family_of(model), output(model, inputs)
    found = self_attention(model, family)
    assert found
    assert not any(site.endswith("attn2") for site in found if name != "sd3")
    for site in found:
        rows = slice(None) if family.order == "cross" else slice(1, None)

        def edit(call, rows=rows):
            call.identity(rows)

        with tap_attention(model, edit, site):
            assert not torch.allclose(output(model, inputs), before, rtol=0, atol=1e-6), site


def test_linear_attention_is_left_out():
    model = tiny.sana()[0]
    assert self_attention(model, family_of(model)) == []
