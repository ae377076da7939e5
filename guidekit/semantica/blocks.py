"""Blocks of the UViT: convolutions at fine grids, self- and cross-attention at coarse ones.

The paper names the blocks and their numbers, not their insides. Here they follow simple diffusion
(arXiv:2301.11093): residual blocks whose second normalisation is scaled and shifted by the noise
embedding; skips are normalised and added, over sqrt(2); queries and keys are normalised.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with zero weights: its residual branch begins as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ConvBlock(nn.Module):
    """Two 3x3 convolutions on (B, C, h, w), modulated by the embedding (B, E)."""

    def __init__(self, channels: int, embedding: int, groups: int, skips: bool, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.norm_skip = nn.GroupNorm(groups, channels) if skips else None
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, affine=False)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(
        self, x: Tensor, emb: Tensor, states: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """x (B, C, h, w); `states` are for the other kind of block."""
        h = self.norm1(x)
        if skip is not None:
            h = (h + self.norm_skip(skip)) * 0.5**0.5
        scale, offset = self.modulation(F.silu(emb))[..., None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(h))) * (1 + scale) + offset
        return x + self.conv2(self.dropout(F.silu(h)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the encoder's tokens, MLP, on tokens (B, N, C)."""

    def __init__(
        self,
        channels: int,
        embedding: int,
        head: int,
        context: int | None,
        skips: bool,
        dropout: float,
    ):
        super().__init__()
        heads = channels // head
        self.norm_skip = nn.LayerNorm(channels) if skips else None
        self.norm1 = nn.LayerNorm(channels, elementwise_affine=False)
        self.attn1 = Attention(channels, heads=heads, dim_head=head, qk_norm="rms_norm")
        self.attn2 = None
        if context is not None:
            self.norm2 = nn.LayerNorm(channels)
            self.attn2 = Attention(
                channels, context, heads=heads, dim_head=head, qk_norm="rms_norm"
            )
            zeroed(self.attn2.to_out[0])
        self.norm3 = nn.LayerNorm(channels, elementwise_affine=False)
        self.mlp1 = nn.Linear(channels, 4 * channels)
        self.mlp2 = zeroed(nn.Linear(4 * channels, channels))
        self.modulation = nn.Linear(embedding, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        zeroed(self.attn1.to_out[0])

    def forward(
        self, x: Tensor, emb: Tensor, states: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """x (B, N, C); states (B, T, D), tokens of the image that is followed."""
        if skip is not None:
            x = (x + self.norm_skip(skip)) * 0.5**0.5
        scale1, offset1, scale2, offset2 = self.modulation(F.silu(emb))[:, None].chunk(4, -1)
        x = x + self.attn1(self.norm1(x) * (1 + scale1) + offset1)
        if self.attn2 is not None:
            x = x + self.attn2(self.norm2(x), states)
        h = F.gelu(self.mlp1(self.norm3(x) * (1 + scale2) + offset2), approximate="tanh")
        return x + self.mlp2(self.dropout(h))


class Stage(nn.Module):
    """The blocks of one grid: `resnets` or `attentions`; the latter see positions.

    Returns the last block's output (B, C, h, w) and those of all, in the blocks' own form, which
    are the `skips` of the stage of the same grid on the way up.
    """

    def __init__(
        self,
        kind: str,
        blocks: int,
        channels: int,
        side: int,
        embedding: int,
        *,
        groups: int,
        head: int,
        context: int | None,
        dropout: float,
        skips: bool = False,
    ):
        super().__init__()
        self.gradient_checkpointing, self.attentions, self.resnets = False, None, None
        if kind == "transformer":
            self.position = nn.Parameter(torch.randn(1, channels, side, side) * 0.02)
            arguments = (channels, embedding, head, context, skips, dropout)
            self.attentions = nn.ModuleList(TransformerBlock(*arguments) for _ in range(blocks))
        else:
            arguments = (channels, embedding, groups, skips, 0.0)
            self.resnets = nn.ModuleList(ConvBlock(*arguments) for _ in range(blocks))

    def forward(
        self, x: Tensor, emb: Tensor, states: Tensor | None, skips: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x (B, C, h, w), emb (B, E), states (B, T, D)."""
        grid, outs = x.shape[-2:], []
        if self.attentions is not None:
            x = (x + self._positions(grid)).flatten(2).transpose(1, 2)  # (B, N, C)
        for block in self.resnets if self.attentions is None else self.attentions:
            skip = None if skips is None else skips.pop()
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, emb, states, skip)
            else:
                x = block(x, emb, states, skip)
            outs.append(x)
        if self.attentions is not None:
            x = x.transpose(1, 2).unflatten(2, grid)
        return x, outs

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Learned positions, enlarged for images of another size than the training's."""
        if tuple(grid) == tuple(self.position.shape[-2:]):
            return self.position
        return F.interpolate(self.position, grid, mode="bilinear")
