"""Rows of benchmarks/layout.py whose layout was trained: controls, with the models beside them.

`--trained RUNS` names the folder in which `guidekit train RECIPE --out RUNS` left them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import guidekit
from guidekit import Condition, LabelMap
from guidekit.affinity.encoders import load_texts
from guidekit.backbones.controls import Control, load_control
from guidekit.backbones.segment_map import SegmentMap, pooled
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
    prior: bool = True  # from phrases to what a map of segments holds

    @property
    def recipe(self) -> str:
        """The recipe that trains it."""
        return self.control.partition("/")[0]


ADAPTER = "scenes-map-adapter/control/model"
ENCODER, SPATIAL = "scenes-map-encoder/both/model", "scenes-spatial/spatial/model"
ZEST = (("zest", {}),)  # as the model is tuned
WEAK = (("zest", {"scale": 0.1}),)  # the most that costs no layout beside the adapter
TRAINED = {
    "adapter": Trained(ADAPTER),
    "adapter + Zest": Trained(ADAPTER, guidances=ZEST),
    "adapter + weak Zest": Trained(ADAPTER, guidances=WEAK),
    "controlnet": Trained("scenes-map-controlnet/control/model"),
    "encoder": Trained("scenes-map-encoder/encoder/model"),
    "encoder, both trained": Trained(f"{ENCODER}/control", ENCODER),
    "spatial": Trained(f"{SPATIAL}/control", SPATIAL, vocabulary="open"),
    "spatial, no prior": Trained(f"{SPATIAL}/control", SPATIAL, vocabulary="open", prior=False),
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
    control = load_control(runs / row.control, "cpu", torch.float32)
    return [Control(control if row.prior else without_prior(control, model))], model


def without_prior(control: SegmentMap, pipeline) -> SegmentMap:
    """A map of segments that holds CLIP's embeddings of the phrases as they are.

    One linear layer gives them for the world's phrases, of which there are fewer than channels.
    """
    states = pooled(pipeline, scenes.CLASSES).float().cpu().double()
    wanted = load_texts("scenes-clip", guidekit.load)(scenes.CLASSES).double()
    inputs = torch.cat([states, torch.ones(len(states), 1, dtype=states.dtype)], 1)
    found = torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
    torch.testing.assert_close(inputs @ found, wanted, rtol=0, atol=1e-3)
    bare = SegmentMap(control.config.text_channels, control.config.channels)
    bare.prior.weight.data, bare.prior.bias.data = found[:-1].T.float(), found[-1].float()
    return bare.eval().requires_grad_(False)


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
