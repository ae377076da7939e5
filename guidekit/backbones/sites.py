"""Names of sites that mean the same on every family, such as `self-attention` and `middle`.

They stand wherever a wildcard of modules may; several words name what is all of them, such as
`middle self-attention`.
"""

from collections.abc import Sequence

from torch import nn

from guidekit.backbones.records import Family, family_of
from guidekit.errors import GuidekitError
from guidekit.taps import find_sites

#: Joint attention is both self-attention and cross-attention; a family without one refuses it.
ALIASES = ("self-attention", "cross-attention", "blocks", "middle")


def named_sites(
    model: nn.Module, patterns: str | Sequence[str], kind: str = "attention"
) -> list[str]:
    """Names of the modules that wildcards and `ALIASES` match, in the model's own order.

    kind: "attention", or "block". Of attention, `blocks` is all in the blocks; of blocks,
    `self-attention` is all that have some. Raises GuidekitError, naming what exists, for what
    matches nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        return []
    found = {site for pattern in patterns for site in _matching(model, pattern, kind)}
    return [site for site in find_sites(model, "*", kind) if site in found]


def _matching(model: nn.Module, pattern: str, kind: str) -> list[str]:
    """The sites of one wildcard, or of a few aliases that all hold."""
    words = pattern.split()
    if not words or any(word not in ALIASES for word in words):
        return find_sites(model, pattern, kind)
    named = [
        _attention(model, word) if kind == "attention" else _blocks(model, word) for word in words
    ]
    sites = [site for site in named[0] if all(site in others for others in named[1:])]
    if not sites:
        there = ", ".join(find_sites(model, "*", kind))
        raise GuidekitError(
            f"{type(model).__name__} has no {kind} site {pattern!r}; it has: {there}"
        )
    return sites


def _attention(model: nn.Module, word: str) -> list[str]:
    """Attention sites of an alias."""
    family = family_of(model)
    if word == "self-attention":
        return self_attention(model, family)
    if word == "cross-attention":
        return find_sites(model, family.cross_sites) if family.cross_sites else []
    blocks = _blocks(model, word)
    return [site for site in find_sites(model, "*") if any(_within(site, b) for b in blocks)]


def _blocks(model: nn.Module, word: str) -> list[str]:
    """Blocks of an alias: the smallest that hold attention of pixels."""
    family = family_of(model)
    known = find_sites(model, family.blocks, "block")
    blocks = [block for block in layers(model) if block in known]
    if word == "middle":
        return middle(model, blocks)
    if word == "blocks":
        return blocks
    sites = _attention(model, word)
    return [block for block in blocks if any(_within(site, block) for site in sites)]


def layers(model: nn.Module) -> list[str]:
    """The smallest blocks that hold attention: transformer blocks, a UNet2DModel's attentions."""
    blocks = find_sites(model, "*", "block")
    sites = find_sites(model, "*")
    holders = {site if site in blocks else site.rpartition(".")[0] for site in sites}
    return [block for block in blocks if block in holders]


def self_attention(model: nn.Module, family: Family) -> list[str]:
    """Attention sites with a softmax where pixels attend to pixels; joint attention is among them.

    Sana's linear attention has no map that could be perturbed.
    """
    if family.order == "text first":  # Lumina2 also refines the text by itself
        return find_sites(model, family.self_sites)
    sites = find_sites(model, "*")
    if family.order == "cross" and family.cross_sites:
        cross = find_sites(model, family.cross_sites)
        sites = [site for site in sites if site not in cross]
    kind = lambda site: type(model.get_submodule(site).processor).__name__  # noqa: E731
    return [site for site in sites if "Linear" not in kind(site)]


def middle(model: nn.Module, possible: list[str]) -> list[str]:
    """The sites in a UNet's middle block, else those of the layer half-way through the model."""
    if inner := [site for site in possible if site.startswith("mid_block.")]:
        return inner
    holders = [block for block in layers(model) if any(_within(s, block) for s in possible)]
    return [site for site in possible if _within(site, holders[len(holders) // 2])]


def _within(site: str, block: str) -> bool:
    return site == block or site.startswith(f"{block}.")
