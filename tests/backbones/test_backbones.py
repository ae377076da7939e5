"""Family records against what real forwards do."""

import pytest
import torch
from diffusers import UNet2DConditionModel, VQModel

import tiny
from guidekit.backbones import records as backbones
from guidekit.backbones.records import (
    family_of,
    halved_grid,
    halvings,
    layout_sites,
    site_grid,
    site_level,
)
from guidekit.errors import GuidekitError
from guidekit.taps import find_sites, tap_attention

UNETS = dict(
    two_levels=dict(),
    # Stable Diffusion 1.x and SDXL as published, in small channels.
    sd=dict(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    sdxl=dict(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    ),
    # `scenes`: cross-attention at both of its levels, or above a third without.
    scenes=dict(
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2
    ),
    scenes_three=dict(
        block_out_channels=(32, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    ),
)


def queries(model, inputs, sites="*"):
    """Rows of each site's query in a real forward."""
    rows = {}
    with torch.no_grad():
        with tap_attention(model, lambda c: rows.update({c.site: c.query.shape[2]}), sites):
            model(**inputs)
    return rows


@pytest.mark.parametrize("config", UNETS)
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (15, 21)])
def test_unet_grids_are_those_of_a_forward(config, size):
    model, inputs, _ = tiny.sd15(*size, **UNETS[config])
    rows = queries(model, inputs)
    assert rows
    for site, n in rows.items():
        h, w = site_grid(model, site, *size)
        assert (h * w, halved_grid(n, *size)) == (n, (h, w))


def test_unet_grid_shapes_are_those_of_the_features():
    """h * w alone would not tell (h, w) from (w, h)."""
    model, inputs, _ = tiny.sd15(15, 22, **UNETS["sd"])
    shapes = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: shapes.update({name: out[0].shape[2:]})
        )
        for name in find_sites(model, ["*attentions.?"], "block")
    ]
    with torch.no_grad():
        model(**inputs)
    assert len(shapes) == len(hooks) == 10
    for name, shape in shapes.items():
        assert site_grid(model, name, 15, 22) == tuple(shape)


LAYOUTS = [
    ("sd", 64, 64, {(32, 32), (16, 16)}),
    ("sd", 64, 96, {(32, 48), (16, 24)}),
    ("sdxl", 128, 128, {(64, 64), (32, 32)}),
    ("sdxl", 104, 152, {(52, 76), (26, 38)}),
    ("scenes", 16, 16, {(16, 16), (8, 8)}),
    ("scenes_three", 16, 16, {(16, 16), (8, 8)}),
    ("two_levels", 16, 16, {(16, 16)}),
]


@pytest.mark.parametrize(("config", "height", "width", "grids"), LAYOUTS)
def test_layout_sites(config, height, width, grids):
    model, _, _ = tiny.sd15(**UNETS[config])
    sites = layout_sites(model, height, width)
    assert set(sites.values()) == grids
    assert all(site.endswith("attn2") for site in sites)
    # every cross-attention of the chosen grids, and no other
    every = find_sites(model, "*.attn2")
    assert list(sites) == [s for s in every if site_grid(model, s, height, width) in grids]


def test_layout_sites_of_sd_as_published():
    model, _, _ = tiny.sd15(layers_per_block=2, **UNETS["sd"])
    sites = layout_sites(model, 64, 64)
    assert len(sites) == 10  # at 32 and at 16: two in the down block, three in the up block
    assert {s.split(".attentions")[0] for s in sites} == {
        "down_blocks.1",
        "down_blocks.2",
        "up_blocks.1",
        "up_blocks.2",
    }


def test_layout_sites_of_the_pipelines():
    for pipe, count in ((tiny.sd_pipeline(), 7), (tiny.sdxl_pipeline(), 8)):
        assert len(layout_sites(pipe.unet, 16, 16)) == count


def test_a_grid_that_does_not_fit_names_those_that_do():
    assert halvings(5, 3) == [(5, 3), (3, 2), (2, 1), (1, 1)]
    assert halved_grid(6, 5, 3) == (3, 2)
    with pytest.raises(GuidekitError, match="100 queries fit no grid of a 16x24 .*96 = 8x12"):
        halved_grid(100, 16, 24)


def test_a_site_without_level_is_refused():
    model, _, _ = tiny.sd15()
    with pytest.raises(GuidekitError, match="'conv_in' has no level"):
        site_level(model, "conv_in")


FAMILIES = dict(
    sd15="sd",
    sdxl="sdxl",
    unet2d="unet2d",
    dit="dit",
    pixart="pixart",
    sd3="sd3",
    flux="flux",
    sana="sana",
    qwen="qwen",
    lumina2="lumina2",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model, _, _ = tiny.MODELS[name]()
    assert family_of(model).name == FAMILIES[name]


def test_an_ip_adapter_does_not_change_the_family():
    model, _, _ = tiny.sd15()
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    assert family_of(model).name == "sd"


def test_no_family_and_two_families_are_refused(monkeypatch):
    with pytest.raises(GuidekitError, match="VQModel matches none of the families: sd, sdxl"):
        family_of(VQModel(block_out_channels=(32,)))
    other = UNet2DConditionModel(
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
        layers_per_block=1,
        encoder_hid_dim=8,
        cross_attention_dim=8,
    )
    with pytest.raises(GuidekitError, match="matches none"):
        family_of(other)
    model, _, _ = tiny.sd15()
    monkeypatch.setattr(backbones, "FAMILIES", backbones.FAMILIES * 2)
    with pytest.raises(GuidekitError, match="matches sd and sd of the families"):
        family_of(model)


@pytest.mark.parametrize("name", ["unet2d", "dit"])
def test_families_without_text_have_no_layout(name):
    model, _, _ = tiny.MODELS[name]()
    with pytest.raises(GuidekitError, match="reads no text"):
        layout_sites(model, 16, 16)


@pytest.mark.parametrize("name", ["pixart", "sana", "sd3", "flux", "qwen", "lumina2"])
def test_transformer_rows_and_grids(name):
    """Pixels and text fill the call exactly, and the pixels fill the grid."""
    model, inputs, _ = tiny.MODELS[name]()
    size = (8, 8) if name == "sana" else (16, 16)
    family, sites = family_of(model), layout_sites(model, *size)
    for site, n in queries(model, inputs, list(sites)).items():
        rows = range(n)[family.rows(n, tiny.TEXT)]
        assert len(rows) == 64
        assert sites[site] == family.grid(64, *size) == (8, 8)


@pytest.mark.parametrize("name", ["pixart", "sana", "sd3", "flux", "qwen", "lumina2"])
def test_text_keys_are_those_that_change_with_the_text(name):
    """In the first block only the text keys, and only the text rows, depend on the text."""
    model, inputs, _ = tiny.MODELS[name]()
    family = family_of(model)
    first = find_sites(model, family.cross_sites)[0]
    seen = []
    other = inputs["encoder_hidden_states"] + torch.randn(tiny.BATCH, tiny.TEXT, 1)
    with torch.no_grad(), tap_attention(model, lambda c: seen.append((c.query, c.key)), first):
        model(**inputs)
        model(**inputs | {"encoder_hidden_states": other * 2})
    (q0, k0), (q1, k1) = seen
    changed = (k0 != k1).any(-1).any(1)[0]
    wanted = torch.zeros_like(changed)
    wanted[family.text_keys(k0.shape[2], tiny.TEXT)] = True
    assert torch.equal(changed, wanted)
    if family.order != "cross":
        rows = family.rows(q0.shape[2], tiny.TEXT)
        assert torch.equal(q0[:, :, rows], q1[:, :, rows])
        assert not torch.equal(q0, q1)
