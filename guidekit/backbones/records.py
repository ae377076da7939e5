"""Records of the denoiser families: where pixels read text, and what grid a site has.

A record says which query rows of a call are pixels, which key columns are text (and of which
text encoder), what grid the pixels form, and which sites carry the layout. Everything else about
a backbone is generic. Grids follow from the latents' height and width; no square is assumed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from guidekit.blocks import block_features
from guidekit.errors import GuidekitError
from guidekit.taps import find_sites

_WHOLE = slice(None)


def halvings(height: int, width: int) -> list[tuple[int, int]]:
    """Grids (h, w) of a latent and its successive halvings down to (1, 1), rounding up.

    A stride-2 convolution with padding 1 maps h to ceil(h / 2).
    """
    grids = [(height, width)]
    while grids[-1] != (1, 1):
        h, w = grids[-1]
        grids.append(((h + 1) // 2, (w + 1) // 2))
    return grids


def halved_grid(n_rows: int, latent_height: int, latent_width: int) -> tuple[int, int]:
    """Grid (h, w) with h * w = n_rows among the halvings of the latent.

    Holds for UNet levels and for patch sizes 1, 2 and 4. Raises GuidekitError if none fits.
    """
    grids = halvings(latent_height, latent_width)
    for h, w in grids:
        if h * w == n_rows:
            return h, w
    sizes = ", ".join(f"{h * w} = {h}x{w}" for h, w in grids)
    raise GuidekitError(
        f"{n_rows} queries fit no grid of a {latent_height}x{latent_width} latent; it has: {sizes}"
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """What guidekit knows of one family of denoisers.

    cross_sites: wildcards of the modules where pixels read text; empty if there is no text.
    order: how a call's rows and keys are packed: "cross" (all rows pixels, all keys text),
    "text first" or "image first" (joint attention). encoders: text encoder to its columns among
    the text keys. layout: names of the default layout sites, from the model. self_sites: wildcards
    of the modules where pixels attend to pixels; empty where that is not SDPA. blocks: wildcards of
    the blocks that can be skipped. further: tokens of other images after the pixels, which a call
    has and the model does not say (`beside`).
    """

    name: str
    matches: Callable[[nn.Module], bool]
    cross_sites: tuple[str, ...] = ()
    order: str = "cross"
    encoders: dict[str, slice] = field(default_factory=dict)
    self_sites: tuple[str, ...] = ("*.attn1",)
    blocks: tuple[str, ...] = ("*transformer_blocks.*",)
    grid: Callable[[int, int, int], tuple[int, int]] = halved_grid
    layout: Callable[[nn.Module, "Family"], list[str]] = (
        lambda model, family: _cross(model, family)  # noqa: PLW0108  (defined below)
    )
    further: int = 0

    def rows(self, n_queries: int, n_text: int) -> slice:
        """Query rows that are pixels, in a call with n_queries rows and n_text text tokens."""
        if self.order == "cross":
            return _WHOLE
        own = n_queries - n_text - self.further
        return slice(n_text, n_text + own) if self.order == "text first" else slice(0, own)

    def beside(self, further: int) -> "Family":
        """The record for calls with so many tokens of other images after the pixels."""
        return replace(self, further=further) if further else self

    def text_keys(self, n_keys: int, n_text: int) -> slice:
        """Key columns that are text, in a call with n_keys keys and n_text text tokens."""
        if self.order == "image first":
            return slice(n_keys - n_text, n_keys)
        return slice(0, n_text)


def _cross(model: nn.Module, family: Family) -> list[str]:
    """Every module where pixels read text."""
    if not family.cross_sites:
        raise GuidekitError(f"family {family.name!r} reads no text, so it has no layout sites")
    return find_sites(model, family.cross_sites)


def site_level(model: nn.Module, site: str) -> int:
    """How many times a UNet has halved the latent at `site`, from its config alone.

    Down block i works at level i before its own downsampler, up block i at n - 1 - i, the middle
    at the coarsest, which a UViT has for itself. Raises GuidekitError for a site outside of the
    blocks.
    """
    last = len(model.config.down_block_types) - 1
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(attentions|resnets)", site):
        index = int(match[2])
        return index if match[1] == "down" else last - index
    if site.startswith("mid_block"):
        return len(model.config.block_out_channels) - 1
    raise GuidekitError(
        f"{site!r} has no level of its own; sites with one are in mid_block and in the "
        "attentions and resnets of down_blocks.N and up_blocks.N"
    )


def _finest_two_below_top(model: nn.Module, family: Family) -> list[str]:
    """Cross-attention sites at 1/2 and 1/4 of the latent, else at the two finest grids.

    1/2 and 1/4 are 32 and 16 for SD 1.x (Zest's choice), 64 and 32 for SDXL. A small UNet without
    both gives its two finest. The middle block alone does not make a level count: it is the
    coarsest of all, and in a three-level UNet too coarse for a layout.
    """
    levels = {site: site_level(model, site) for site in _cross(model, family)}
    outer = sorted({level for s, level in levels.items() if not s.startswith("mid_block")})
    chosen = (1, 2) if {1, 2} <= set(outer) else outer[:2]
    return [site for site, level in levels.items() if level in chosen]


def _is(class_name: str, **config: tuple) -> Callable[[nn.Module], bool]:
    """Test for a class by name, anywhere in the ancestry, and for allowed values of its config."""

    def matches(model: nn.Module) -> bool:
        if all(c.__name__ != class_name for c in type(model).__mro__):
            return False
        return all(getattr(model.config, key) in allowed for key, allowed in config.items())

    return matches


def _reads_more(model: nn.Module) -> bool:
    """Whether a UNet2DModel reads more channels than it makes: those of a label map."""
    return model.config.in_channels > model.config.out_channels


# UNet2DConditionModel also serves IF, Kandinsky and others, with other conditions and key orders.
FAMILIES = [
    Family(
        name="sd",
        matches=_is(
            "UNet2DConditionModel",
            addition_embed_type=(None,),
            encoder_hid_dim_type=(None, "ip_image_proj"),  # the latter once IP-Adapter is loaded
        ),
        cross_sites=("*.attn2",),
        encoders={"clip": _WHOLE},
        layout=_finest_two_below_top,
    ),
    Family(
        name="sdxl",
        matches=_is("UNet2DConditionModel", addition_embed_type=("text_time",)),
        cross_sites=("*.attn2",),
        # The two encoders are joined in channels: each token has one key.
        encoders={"clip": _WHOLE, "openclip": _WHOLE},
        layout=_finest_two_below_top,
    ),
    Family(
        name="unet2d",
        matches=lambda model: _is("UNet2DModel")(model) and not _reads_more(model),
        self_sites=("*attentions.*",),
        blocks=("*attentions.*",),
    ),
    Family(
        name="maps",
        matches=lambda model: _is("UNet2DModel")(model) and _reads_more(model),
        self_sites=("*attentions.*",),
        blocks=("*attentions.*",),
    ),
    Family(
        name="uvit",
        matches=_is("UViT"),
        cross_sites=("*.attn2",),  # to the tokens of an image
        blocks=("*attentions.*",),
        encoders={"image": _WHOLE},
    ),
    Family(name="dit", matches=_is("DiTTransformer2DModel")),
    Family(
        name="pixart",
        matches=_is("PixArtTransformer2DModel"),
        cross_sites=("*.attn2",),
        encoders={"t5": _WHOLE},
    ),
    Family(
        name="sana",
        matches=_is("SanaTransformer2DModel"),
        cross_sites=("*.attn2",),
        self_sites=(),  # linear attention
        encoders={"gemma": _WHOLE},
    ),
    Family(
        name="sd3",
        matches=_is("SD3Transformer2DModel"),
        # attn2 of SD3.5's dual blocks is image self-attention.
        cross_sites=("transformer_blocks.*.attn",),
        self_sites=("transformer_blocks.*.attn",),
        order="image first",
        encoders={"clip": slice(0, 77), "t5": slice(77, None)},
    ),
    Family(
        name="flux",
        matches=_is("FluxTransformer2DModel"),
        cross_sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        self_sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        order="text first",
        encoders={"t5": _WHOLE},
    ),
    Family(
        name="qwen",
        matches=_is("QwenImageTransformer2DModel"),
        cross_sites=("transformer_blocks.*.attn",),
        self_sites=("transformer_blocks.*.attn",),
        order="text first",
        encoders={"qwen": _WHOLE},
    ),
    Family(
        name="lumina2",
        matches=_is("Lumina2Transformer2DModel"),
        # Before these the text and the pixels are refined apart.
        cross_sites=("layers.*.attn",),
        self_sites=("noise_refiner.*.attn", "layers.*.attn"),
        blocks=("layers.*",),
        order="text first",  # each image's own number of tokens, without padding
        encoders={"gemma": _WHOLE},
    ),
]


def family_of(model: nn.Module) -> Family:
    """The one record that matches the model; ValueError, naming the families, for none or two."""
    found = [family for family in FAMILIES if family.matches(model)]
    if len(found) == 1:
        return found[0]
    matched = " and ".join(f.name for f in found) or "none"
    there = ", ".join(family.name for family in FAMILIES)
    raise GuidekitError(f"{type(model).__name__} matches {matched} of the families: {there}")


def layout_sites(model: nn.Module, latent_height: int, latent_width: int) -> dict[str, tuple]:
    """Default sites for layout, each with its grid (h, w), known before any forward.

    Raises GuidekitError for a model that reads no text.
    """
    family = family_of(model)
    return {
        site: site_grid(model, site, latent_height, latent_width)
        for site in family.layout(model, family)
    }


def site_grid(
    model: nn.Module, site: str, latent_height: int, latent_width: int
) -> tuple[int, int]:
    """Grid (h, w) of the pixels at a site: of its UNet level, or of the transformer's patches.

    For Flux and Qwen, whose patches the pipeline packs, the latent is the unpacked one.
    """
    if hasattr(model.config, "down_block_types"):
        patch = model.config.get("patch_size", 1)
        grids = halvings(latent_height // patch, latent_width // patch)
        return grids[min(site_level(model, site), len(grids) - 1)]
    packed = family_of(model).order == "text first"
    patch = 2 if packed else model.config.patch_size
    return latent_height // patch, latent_width // patch


def in_pixels(model: nn.Module, output: object) -> bool:
    """Whether a block's output is a UNet's (B, C, h, w), not tokens, which a UViT's can be."""
    in_tokens = isinstance(output, Tensor) and output.ndim == 3
    return hasattr(model.config, "down_block_types") and not in_tokens


def site_features(model: nn.Module, site: str, output: object, grid: tuple[int, int]) -> Tensor:
    """Features (B, C, h, w) of the pixels out of a block's output, for latents of the grid (h, w).

    Raises GuidekitError for a block of a transformer that sees text alone.
    """
    if in_pixels(model, output):
        return block_features(output)
    own = site_grid(model, site, *grid)
    apart = not isinstance(output, Tensor)  # text and pixels, after which may be other images
    tokens = output[-1][:, : own[0] * own[1]] if apart else output
    count, pixels = tokens.shape[1], own[0] * own[1]
    if count < pixels:
        raise GuidekitError(
            f"{site} holds {count} tokens of text and no pixels; choose another block"
        )
    rows = family_of(model).rows(count, count - pixels) if count > pixels else slice(None)
    return block_features(output, own, rows)
