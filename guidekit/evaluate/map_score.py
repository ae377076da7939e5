"""How well an attention map agrees with the mask that it should follow."""

from torch import Tensor

from guidekit.masks import resize_mask

HALF = 0.5  # of its peak, from which a place counts as attended


def inside(attention: Tensor, mask: Tensor) -> float:
    """Share of a map (h, w) that lies inside a mask (H, W), from 0 to 1."""
    values = attention.detach().float().cpu()
    share = (values * resize_mask(mask, *values.shape)).sum() / values.sum()
    return round(float(share.nan_to_num()), 4)


def filled(attention: Tensor, mask: Tensor) -> float:
    """Share of a mask (H, W) where a map (h, w) has half of its peak or more, from 0 to 1."""
    values = attention.detach().float().cpu()
    inner = resize_mask(mask, *values.shape)
    share = (inner * (values >= HALF * values.max())).sum() / inner.sum()
    return round(float(share.nan_to_num()), 4)
