"""Names of sites that mean the same on every family."""

import pytest

import tiny
from guidekit import GuidekitError
from guidekit.backbones.sites import ALIASES, named_sites
from guidekit.taps import find_sites

#: Family to blocks, attention sites among them, sites where pixels read text.
TRUTH = {
    "sd15": ("down_blocks.0.attentions.0.transformer_blocks.0", "attn1", "attn2"),
    "sdxl": ("down_blocks.1.attentions.0.transformer_blocks.0", "attn1", "attn2"),
    "dit": ("transformer_blocks.0", "attn1", None),
    "pixart": ("transformer_blocks.0", "attn1", "attn2"),
    "sana": ("transformer_blocks.0", None, "attn2"),
    "sd3": ("transformer_blocks.0", "attn", "attn"),
    "flux": ("transformer_blocks.0", "attn", "attn"),
    "qwen": ("transformer_blocks.0", "attn", "attn"),
    "lumina2": ("layers.0", "attn", "attn"),
    "unet2d": ("down_blocks.1.attentions.0", "", None),
}


@pytest.mark.parametrize("name", TRUTH)
def test_each_family_has_them(name):
    model, block = tiny.MODELS[name]()[0], TRUTH[name][0]
    blocks = named_sites(model, "blocks", "block")
    assert block in blocks
    assert not any("context" in b for b in blocks)
    middle = named_sites(model, "middle", "block")
    assert 0 < len(middle) < len(blocks)
    assert set(middle) < set(blocks)
    for alias, inner in zip(ALIASES, TRUTH[name][1:], strict=False):
        if inner is None:
            with pytest.raises(GuidekitError, match=f"has no attention site '{alias}'; it has"):
                named_sites(model, alias)
            continue
        sites = named_sites(model, alias)
        assert f"{block}.{inner}".rstrip(".") in sites
        inside = named_sites(model, f"middle {alias}")
        assert inside == [s for s in sites if any(s.startswith(m) for m in middle)] != sites
        assert set(named_sites(model, alias, "block")) <= set(blocks)


def test_wildcards_and_names_are_joined_in_the_models_order():
    model = tiny.MODELS["sd15"]()[0]
    both = named_sites(model, ["up_blocks.1.*.attn2", "middle"])
    every = find_sites(model, "*")
    assert both == [s for s in every if s in both]
    assert {s.split(".")[0] for s in both} == {"mid_block", "up_blocks"}
    with pytest.raises(GuidekitError, match="'midle' matches no attention site"):
        named_sites(model, "midle")
