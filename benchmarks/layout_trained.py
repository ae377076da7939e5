"""Rows of benchmarks/layout.py whose layout was trained: controls, with the models beside them.

`--trained RUNS` names the folder in which `guidekit train RECIPE --out RUNS` left them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import guidekit
from guidekit import Condition, LabelMap
from guidekit.backbones.controls import Control, load_control
from guidekit.backbones.segment_map import SegmentMap
from guidekit.evaluate import label_maps
from guidekit.synthesis.data import SOURCE_LABELS
from guidekit.worlds import scenes


@dataclass(frozen=True)
class Trained:
    """Where a row's control and model lie below the folder of the runs, and what guides beside."""

    control: str
    model: str = ""  # the setting's
    guidances: tuple[tuple[str, dict], ...] = ()
    vocabulary: str = "closed"

    @property
    def recipe(self) -> str:
        """The recipe that trains it."""
        return self.control.partition("/")[0]


ADAPTER = "scenes-map-adapter/control/model"
ENCODER, SPATIAL = "scenes-map-encoder/both/model", "scenes-spatial/spatial/model"
ZEST = (("zest", {}),)  # as the model is tuned
TRAINED = {
    "adapter": Trained(ADAPTER),
    "adapter + Zest": Trained(ADAPTER, guidances=ZEST),
    "controlnet": Trained("scenes-map-controlnet/control/model"),
    "encoder": Trained("scenes-map-encoder/encoder/model"),
    "encoder, both trained": Trained(f"{ENCODER}/control", ENCODER),
    "spatial": Trained(f"{SPATIAL}/control", SPATIAL, vocabulary="open"),
}
FREE = ("Paint-with-Words", "Zest", "Zest + PwW", "MultiDiffusion")


def kind(method: str) -> dict[str, str]:
    """Columns of a row with a layout: which words it takes, and whether it was trained."""
    if method in FREE:
        return {"vocabulary": "open", "trained": "no"}
    if method in TRAINED:
        return {"vocabulary": TRAINED[method].vocabulary, "trained": "yes"}
    return {}


def there(runs: Path) -> list[str]:
    """The rows whose models are there."""
    return [name for name, row in TRAINED.items() if (runs / row.control).is_dir()]


def loaded(method: str, runs: Path) -> tuple[list[Control], object | None]:
    """The control of a row, and its model if it is its own."""
    row = TRAINED[method]
    model = guidekit.load(str(runs / row.model), "cpu", torch.float32) if row.model else None
    return [Control(load_control(runs / row.control, "cpu", torch.float32))], model


def with_maps(
    conditions: Sequence[Condition], first: int, controls: Sequence[Control]
) -> list[Condition]:
    """The conditions of held-out scenes from `first` on with dense maps, for controls of maps."""
    if any(isinstance(control.model, SegmentMap) for control in controls):
        return list(conditions)
    plans = label_maps.held_out(len(conditions), first)
    ids = (torch.from_numpy(scenes.dense_labels(plan, 64)) for plan in plans)
    maps = (LabelMap(own, SOURCE_LABELS) for own in ids)
    return [replace(c, map=own) for c, own in zip(conditions, maps, strict=True)]
