"""Pixel models of label maps: MapsPipeline, whose UNet reads the one-hot map beside the pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from guidekit.backbones.base import Text
from guidekit.backbones.control_images import check_shape
from guidekit.backbones.pixel import PixelDenoiser
from guidekit.branches import windowed
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.labels import LabelMap, LabelSet, check_labels

MAP = "label_map"  # the key of a text that holds the one-hot maps
READER = "the model draws from"  # of a map, in messages


class Maps(Text):
    """The one-hot maps of B images."""

    def windowed(self, view: tuple[int, int, int, int] | None) -> Text:
        """The part of the maps in a window (top, left, height, width)."""
        if view is None:
            return self
        return Maps({MAP: windowed(self.given[MAP], *view)})


class MapsDenoiser(PixelDenoiser, families=("maps",)):
    """MapsPipeline: `Condition.map`; the null is a map of zeros, in which no pixel has a class."""

    cfg = 1.5

    @property
    def reads_map(self) -> bool:
        """It follows `Condition.map`."""
        return True

    @property
    def labels(self) -> LabelSet:
        """The classes that it was trained on. Raises GuidekitError for a pipeline without them."""
        found = getattr(self.pipeline, "labels", None)
        if not isinstance(found, LabelSet):
            raise GuidekitError(
                f"{type(self.pipeline).__name__} reads {self.model.config.in_channels} channels "
                "and does not say of which classes; models of label maps are MapsPipelines"
            )
        return found

    @property
    def channels(self) -> int:
        """Channels of the pixels; the map's come beside them."""
        return self.model.config.out_channels

    @property
    def multiple(self) -> int:
        """Height and width must be halved as often as the model has levels."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    def check(self, conditions: list[Condition]) -> None:
        """Raises GuidekitError for a condition without a map of its classes, and for texts."""
        super().check(conditions)
        for condition in conditions:
            if condition.map is None:
                raise GuidekitError(
                    f"{type(self.pipeline).__name__} follows a label map: give --map MAP.png, or "
                    "Condition(map=LabelMap(...))"
                )
            check_labels(condition.map, self.labels, READER)
        self.check_no_text(conditions, "follows a label map")

    def content(self, condition: Condition) -> LabelMap | str:
        """The map; nothing where a head asks without one."""
        return condition.prompt if condition.map is None else condition.map

    def text(self, prompts: list, size: tuple[int, int], null: bool = False) -> Text:
        """The one-hot maps (B, N, H, W), or zeros for each."""
        if null:
            shown = torch.zeros(len(prompts), len(self.labels), *size)
        else:
            shown = one_hot_maps(prompts, self.labels, size)
        return Maps({MAP: shown.to(self.device, self.dtype)})

    def __call__(self, z: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The model's output (B, 3, H, W) for scaled z (B, 3, H, W)."""
        both = torch.cat([z, text.given[MAP]], 1)
        return self.network(both, timestep, return_dict=False)[0]


def one_hot_maps(maps: Sequence[LabelMap], labels: LabelSet, size: tuple[int, int]) -> Tensor:
    """The maps (B, N, H, W) at a size, by nearest neighbour.

    Raises GuidekitError for maps of another label set, and for those that would be stretched.
    """
    for own in maps:
        check_labels(own, labels, READER)
        check_shape(own.ids.shape[1], own.ids.shape[0], size, "the label map")
    return torch.stack([own.resized(*size).one_hot() for own in maps])
