"""What plugin authors may import beside `guidekit`: tokens, masks, sites, references, judges.

These names are promised as those of `guidekit` are; everything else in the package may move.

From a phrase to its tokens: `token_columns` finds the columns of a phrase in one prompt,
`segment_weights` those of all segments of a run as (B, T, S), `real_tokens` tells words from
padding. From a segment to its mask: `segment_masks` gives (B, S, h, w) at the grid of a site.
Attention among pixels is read in `edit_attention` at `self_attention` sites by `probabilities`.
`descend` moves z against the gradient of an energy, inside a `refine`; `TokenMaps` are maps of
single tokens for it, at `sites_of_one_grid` if so wished, and `smoothed`; `TokenMoves` is a base of
guidance by both.
`InverseGuidance` and `LossGuidance` are bases of guidance by a measurement or a loss, whose
operators are `LinearOperator`s; `Contrast` is one of other classifier-free guidance.
`named` finds what an option of the type `ImportPath` names.
A judge that never guides is a network by `load_judge`, with logits (B, 49, H, W) of classes and
features (B, 64) as its output; `see` runs it on a batch of images.

Names are resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Contrast": "bases.contrast",
    "Downsampling": "bases.operators",
    "Grey": "bases.operators",
    "ImportPath": "options",
    "Inpainting": "bases.operators",
    "InverseGuidance": "bases.inverse",
    "LinearOperator": "bases.operators",
    "LossGuidance": "bases.inverse",
    "REWARDS": "bases.rewards",
    "Reward": "bases.rewards",
    "RewardFunction": "bases.rewards",
    "as_reward": "bases.rewards",
    "guiding": "bases.rewards",
    "rewarded": "bases.rewards",
    "TokenMaps": "bases.token_reads",
    "TokenMoves": "bases.token_moves",
    "as_mask": "masks",
    "as_operator": "bases.operators",
    "derived_seed": "seeds",
    "descend": "bases.descent",
    "find_sites": "taps",
    "layers": "backbones.sites",
    "load_judge": "evaluate.judge",
    "lost_edit": "backbones.schedulers",
    "named": "bases.named",
    "other_scheduler": "backbones.schedulers",
    "pixel_rows": "bases.perturbed",
    "probabilities": "attention.maps",
    "read_references": "references",
    "real_tokens": "backbones.tokens",
    "require_segments": "conditions",
    "resize_mask": "masks",
    "schedulers_for": "backbones.schedulers",
    "see": "evaluate.judge",
    "segment_masks": "conditions",
    "segment_strengths": "conditions",
    "segment_weights": "backbones.tokens",
    "self_attention": "backbones.sites",
    "sites_of_one_grid": "bases.token_reads",
    "smoothed": "bases.token_reads",
    "square": "references",
    "to_image": "images",
    "systematic": "groups",
    "token_columns": "backbones.tokens",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from guidekit.attention.maps import probabilities
    from guidekit.backbones.schedulers import lost_edit, other_scheduler, schedulers_for
    from guidekit.backbones.sites import layers, self_attention
    from guidekit.backbones.tokens import real_tokens, segment_weights, token_columns
    from guidekit.bases.contrast import Contrast
    from guidekit.bases.descent import descend
    from guidekit.bases.inverse import InverseGuidance, LossGuidance
    from guidekit.bases.named import named
    from guidekit.bases.operators import Downsampling, Grey, Inpainting, LinearOperator, as_operator
    from guidekit.bases.perturbed import pixel_rows
    from guidekit.bases.rewards import REWARDS, Reward, RewardFunction, as_reward, guiding, rewarded
    from guidekit.bases.token_moves import TokenMoves
    from guidekit.bases.token_reads import TokenMaps, sites_of_one_grid, smoothed
    from guidekit.conditions import require_segments, segment_masks, segment_strengths
    from guidekit.evaluate.judge import load_judge, see
    from guidekit.groups import systematic
    from guidekit.images import to_image
    from guidekit.masks import as_mask, resize_mask
    from guidekit.options import ImportPath
    from guidekit.references import read_references, square
    from guidekit.seeds import derived_seed
    from guidekit.taps import find_sites


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"guidekit.toolbox has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"guidekit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
