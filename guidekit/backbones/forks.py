"""Blocks at whose entry rows can join a running call of a model: between them it mixes no rows.

What models do outside of these blocks, once the first of them has run, is on the tensors that the
blocks hand on alone. It was looked up in the forward of each class that is named here.
"""

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from guidekit.taps import called

#: Attributes in the order in which they run; of lists each member is a block.
ORDER: dict[type[nn.Module], tuple[str, ...]] = {
    UNet2DConditionModel: ("down_blocks", "mid_block", "up_blocks"),
    SD3Transformer2DModel: ("transformer_blocks", "norm_out"),
    FluxTransformer2DModel: ("transformer_blocks", "single_transformer_blocks", "norm_out"),
}


def fork_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks as they run; none for other classes and where parts are compiled."""
    if any(called(module) != "forward" for module in model.modules()):
        return []
    found = []
    for name in ORDER.get(type(model), ()):
        part = getattr(model, name)
        if isinstance(part, nn.ModuleList):
            found += [f"{name}.{index}" for index in range(len(part))]
        elif part is not None:
            found.append(name)
    return found
