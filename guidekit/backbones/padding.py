"""Sequences in which each image's pixels follow its own number of text tokens.

Such a model (Lumina2) puts padding after the pixels of the shorter ones, so no one slice holds the
pixels of a batch. Moved to between text and pixels, the padding leaves every image the same
columns, and attention does not see the order of its tokens.
"""

import torch
from torch import Tensor

from guidekit.attention.call import AttentionCall


def aligned(lengths: list[int], rows: int) -> Tensor:
    """Order (B, rows) of the tokens with the padding between the text and the pixels.

    lengths: text tokens of each image. rows: those of the longest, and the pixels.
    """
    most = max(lengths)
    place = torch.arange(rows)
    orders = [
        torch.cat([place[:own], place[own + rows - most :], place[own : own + rows - most]])
        for own in lengths
    ]
    return torch.stack(orders)


def taken(x: Tensor, order: Tensor) -> Tensor:
    """Tokens (B, ..., N, C) in another order (B, N) for each image."""
    index = order.to(x.device).view(len(order), *[1] * (x.ndim - 3), -1, 1)
    return x.gather(-2, index.expand(x.shape))


def reorder(call: AttentionCall, order: Tensor) -> None:
    """Puts the tokens of a self-attention call in another order (B, N).

    mask: one for all queries (B, 1, 1, N), as padding has it.
    """
    call.query, call.key, call.value = (taken(x, order) for x in (call.query, call.key, call.value))
    call.mask = taken(call.mask.mT, order).mT
