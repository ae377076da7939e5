"""An encoder whose tokens tell objects apart: a CLIP tower trained on to name what images hold.

Query2Label (Liu et al. 2021, arXiv:2107.10834): one learned query for every label attends to the
tokens of the last block and answers whether the image holds what it stands for. A CLIP trains
only the class token there; the other tokens, which a denoiser attends to, are left as they fall.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from guidekit.images import heat_map
from guidekit.semantica.encode import ImageEncoder, load_encoder
from guidekit.worlds import scenes

RARE = -3.0  # first logit: most images hold one to three of the 48 objects


@dataclass(kw_only=True)
class TagsOptions:
    """What is trained on."""

    encoder: str = "scenes-clip"  # see guidekit.semantica.encode.load_encoder
    heads: int = 4  # of the queries' attention


class TagLoss(nn.Module):
    """Binary cross-entropy of every label, read from an encoder's tokens."""

    def __init__(self, encoder: ImageEncoder, labels: int, heads: int):
        super().__init__()
        width = encoder.shapes()[1]
        self.encoder = encoder
        self.queries = nn.Parameter(torch.randn(labels, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Parameter(torch.randn(labels, width) * 0.05)
        self.bias = nn.Parameter(torch.full((labels,), RARE))

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, L) of pixels (B, 3, H, W) in [-1, 1]."""
        tokens = self.encoder(pixels)[0]
        tokens = F.layer_norm(tokens, tokens.shape[-1:])  # as UViT normalises them
        queries = self.queries.expand(len(tokens), -1, -1)
        found = self.attention(queries, tokens, tokens, need_weights=False)[0]
        return (self.norm(found) * self.out).sum(-1) + self.bias

    def forward(self, pixels: Tensor, held: Tensor) -> dict[str, Tensor]:
        """Loss of pixels (B, 3, H, W), `held` (B, L) being 1 for what an image holds."""
        loss = F.binary_cross_entropy_with_logits(self.logits(pixels).float(), held)
        return {"tags": loss}


class TagsTask:
    """Trains an encoder on scenes, whose labels are objects such as `red circle`."""

    def __init__(self, options: TagsOptions, size: int):
        self.options, self.size = options, size
        self.net = self.whole_net()

    def whole_net(self) -> nn.Module:
        """A net of this form."""
        encoder = load_encoder(self.options.encoder).requires_grad_(True).train()
        return TagLoss(encoder, len(scenes.CLASSES), self.options.heads)

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Images and what they hold."""
        plans = [scenes.scene(i) for i in numbers]
        return {"pixels": scenes.batch(plans, self.size)[0], "held": held(plans)}

    def preview(self) -> Image.Image:
        """Probabilities of the labels (columns) in 48 held-out images (rows)."""
        plans = [scenes.scene(i, "test") for i in range(48)]
        with torch.no_grad():
            return heat_map(self.net.logits(scenes.batch(plans, self.size)[0]).float().sigmoid())

    def export(self, folder: Path) -> None:
        """Saves the encoder alone, in half precision."""
        encoder = self.net.encoder.copied(source=f"{self.options.encoder} with tags")
        encoder.half().save_pretrained(folder)


def held(plans: list[scenes.Scene]) -> Tensor:
    """(B, 48): 1 for the objects that each scene holds."""
    table = torch.zeros(len(plans), len(scenes.CLASSES))
    for row, plan in zip(table, plans, strict=True):
        row[[scenes.CLASSES.index(thing.phrase) for thing in plan.things]] = 1
    return table


def make(options: TagsOptions, folder: Path, size: int, quiet: bool = True) -> TagsTask:
    """The task of a recipe's stage, which needs nothing of earlier ones."""
    return TagsTask(options, size)


OPTIONS = TagsOptions  # of a recipe's stage
