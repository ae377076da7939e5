"""guidekit steers frozen diffusion backbones while they sample.

    import guidekit
    pipe = guidekit.load("scenes")
    condition = guidekit.Condition("a red circle on a white background", segments=(...,))
    images = guidekit.sample(pipe, condition, [Zest()], seeds=range(4)).finish().images

Names are resolved on first use, so that the command line starts without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from guidekit.hookspecs import hookimpl

__version__ = "0.1.0"

_HOME = {
    "AttentionCall": "attention.call",
    "AttentionRead": "reads",
    "BlockCall": "blocks",
    "Branch": "branches",
    "Condition": "conditions",
    "Control": "backbones.controls",
    "Denoiser": "backbones.denoiser",
    "Eval": "reads",
    "FeatureRead": "reads",
    "Guidance": "guidance",
    "GuidekitError": "errors",
    "LabelMap": "labels",
    "LabelSet": "labels",
    "Level": "noise",
    "Levels": "levels",
    "Move": "levels",
    "Perturbed": "bases.perturbed",
    "Reference": "references",
    "Run": "run",
    "Sampling": "sampler",
    "Segment": "conditions",
    "Step": "step",
    "attach": "attached",
    "average_maps": "reads",
    "box_mask": "masks",
    "draw": "drawing",
    "level": "noise",
    "load": "inputs.given",
    "make": "inputs.given",
    "load_label_set": "labels",
    "load_layout": "layouts",
    "load_mask": "masks",
    "load_reference": "references",
    "read_label_map": "inputs.label_files",
    "sample": "drawing",
    "tap_attention": "taps",
    "tap_blocks": "taps",
    "token_maps": "attention.maps",
}

__all__ = ["hookimpl", *_HOME]  # noqa: PLE0604  (keys, all texts)

if TYPE_CHECKING:
    from guidekit.attached import attach
    from guidekit.attention.call import AttentionCall
    from guidekit.attention.maps import token_maps
    from guidekit.backbones.controls import Control
    from guidekit.backbones.denoiser import Denoiser
    from guidekit.bases.perturbed import Perturbed
    from guidekit.blocks import BlockCall
    from guidekit.branches import Branch
    from guidekit.conditions import Condition, Segment
    from guidekit.drawing import draw, sample
    from guidekit.errors import GuidekitError
    from guidekit.guidance import Guidance
    from guidekit.inputs.given import load, make
    from guidekit.inputs.label_files import read_label_map
    from guidekit.labels import LabelMap, LabelSet, load_label_set
    from guidekit.layouts import load_layout
    from guidekit.levels import Levels, Move
    from guidekit.masks import box_mask, load_mask
    from guidekit.noise import Level, level
    from guidekit.reads import AttentionRead, Eval, FeatureRead, average_maps
    from guidekit.references import Reference, load_reference
    from guidekit.run import Run
    from guidekit.sampler import Sampling
    from guidekit.step import Step
    from guidekit.taps import tap_attention, tap_blocks


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"guidekit has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"guidekit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
