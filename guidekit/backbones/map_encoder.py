"""An encoder of label maps into tokens that the pixels attend to, after PITI's.

Wang et al.: Pretraining is all you need for image-to-image translation, 2022, arXiv:2205.12952. The
tokens come after those of the prompt, so that phrases keep their columns; PITI has no prompt.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn


class MapEncoder(ModelMixin, ConfigMixin):
    """One-hot maps (B, N, H, W) to tokens (B, 1 + T, width), the first of which is of the whole.

    channels: of the convolutions; each but the first layer halves the side, to a `grid` of tokens
    at the trained size. PITI adds its token of the whole to the time embedding, for which a UNet
    that was trained without it has no place. There is no normalisation of single maps: a map of one
    class would be nearly 0/0.
    """

    @register_to_config
    def __init__(
        self,
        conditioning_channels: int = 52,
        width: int = 128,
        grid: int = 8,
        channels: tuple[int, ...] = (32, 64, 128),
        layers: int = 2,
        heads: int = 4,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(conditioning_channels, channels[0], 7, padding=3)
        sides = zip(channels, (*channels[1:], width), strict=True)
        self.halvings = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in sides)
        self.places = nn.Parameter(torch.randn(1, width, grid, grid) * 0.02)
        self.whole = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, width // heads) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Tokens (B, 1 + T, width) of one-hot maps (B, N, H, W); zeros are the null map."""
        x = self.conv_in(maps)
        for halve in self.halvings:
            x = halve(F.silu(x))
        places = self.places
        if places.shape[-2:] != x.shape[-2:]:
            places = F.interpolate(places, x.shape[-2:], mode="bilinear")
        x = (x + places).flatten(2).transpose(1, 2)
        x = torch.cat([self.whole.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
