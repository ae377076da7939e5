"""Maps of segments as further channels of the latents, after SpaText.

Avrahami et al.: SpaText, CVPR 2023, arXiv:2211.14305: every pixel of a segment holds the segment's
image embedding, other pixels zeros, and the UNet's first layer reads them beside the latents. At
sampling a prior makes the image embedding of the segment's phrase. The paper's prior is a diffusion
model; ours is one linear layer, fitted by ridge regression.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from guidekit.backbones.remade import remade
from guidekit.conditions import Condition, require_segments, segment_masks


class SegmentMap(ModelMixin, ConfigMixin):
    """The prior: pooled states of a text encoder (B, D) to image embeddings (B, channels)."""

    @register_to_config
    def __init__(self, text_channels: int = 128, channels: int = 128):
        super().__init__()
        self.prior = nn.Linear(text_channels, channels)

    def forward(self, states: Tensor) -> Tensor:
        """Embeddings (B, channels), their mean square 1."""
        return scaled(self.prior(states))


def scaled(embeddings: Tensor) -> Tensor:
    """Embeddings (B, d) with a mean square of 1, the size of normal noise."""
    return nn.functional.normalize(embeddings, dim=-1) * embeddings.shape[-1] ** 0.5


def pooled(pipeline: Any, texts: Sequence[str]) -> Tensor:
    """The pooled states (B, D) of a Stable Diffusion pipeline's text encoder."""
    inputs = pipeline.tokenizer(
        list(texts), padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return pipeline.text_encoder(inputs["input_ids"].to(pipeline.device)).pooler_output


def painted(embeddings: Tensor, masks: Tensor) -> Tensor:
    """The map (d, h, w) of embeddings (S, d) in masks (S, h, w) in [0, 1].

    Where masks overlap it is the mean, weighted by them.
    """
    total = masks.sum(0).clamp(min=1)
    return torch.einsum("sd,shw->dhw", embeddings, masks / total)


def segment_maps(
    model: SegmentMap, pipeline: Any, conditions: Sequence[Condition], grid: tuple[int, int]
) -> Tensor:
    """The maps (B, d, h, w) of the conditions' segments on the latents' grid (h, w).

    A segment's strength is a factor of its embedding. Raises GuidekitError for a condition without
    segments.
    """
    require_segments(list(conditions), "a control that reads segments")
    rows = []
    for condition in conditions:
        masks = segment_masks([condition], *grid)[0]
        with torch.no_grad():
            states = pooled(pipeline, [segment.phrase for segment in condition.segments])
            found = model(states.to(model.device, model.dtype))
        strengths = torch.tensor([segment.strength for segment in condition.segments])
        rows.append(painted(found * strengths[:, None].to(found), masks.to(found)))
    return torch.stack(rows)


def widened(unet: UNet2DConditionModel, channels: int) -> UNet2DConditionModel:
    """A copy of the UNet whose first layer reads further channels, which change nothing yet."""
    own = unet.config.in_channels
    made = remade(unet, in_channels=own + channels)
    state = dict(unet.state_dict())
    first = state["conv_in.weight"]
    zeros = first.new_zeros(len(first), channels, *first.shape[2:])
    made.load_state_dict(state | {"conv_in.weight": torch.cat([first, zeros], 1)})
    nn.Module.to(
        made, unet.device, unet.dtype
    )  # that of diffusers warns of parts that it has none of
    return made.train(unet.training)
