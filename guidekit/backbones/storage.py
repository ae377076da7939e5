"""Weights that are stored narrower than they are computed with, as in float8.

diffusers' `enable_layerwise_casting` widens a layer's weights before its forward and narrows them
after it, so that backward would find the narrow ones.
"""

import contextlib

import torch
from torch import Tensor, nn

from guidekit.errors import GuidekitError

CASTING = "layerwise_casting"  # name of diffusers' hook


def check_storage(model: nn.Module) -> None:
    """Raises GuidekitError for weights in which torch's own layers cannot compute."""
    for name, module in model.named_modules():
        if not type(module).__module__.startswith("torch.nn") or _casts(module):
            continue
        for weight in module.parameters(recurse=False):
            if weight.is_floating_point() and weight.element_size() == 1:
                kind = str(weight.dtype)
                raise GuidekitError(
                    f"weights of {name} are {kind.removeprefix('torch.')}, in which nothing can be "
                    "computed; load the model in bfloat16 and call enable_layerwise_casting("
                    f"storage_dtype={kind}, compute_dtype=torch.bfloat16) on the denoiser"
                )


def wide_weights(
    model: nn.Module, checkpoints: bool = False
) -> contextlib.AbstractContextManager[object]:
    """Forwards inside keep the weights that they computed with until their backward.

    So all are wide as long as the graph lives. Raises GuidekitError for checkpoints, whose second
    forward keeps narrow ones.
    """
    if not casts(model):
        return contextlib.nullcontext()
    if checkpoints:
        raise GuidekitError(
            "gradient checkpointing (memory 'low', or the denoiser's own) does not go with "
            "enable_layerwise_casting; leave one out"
        )
    return torch.autograd.graph.saved_tensors_hooks(_numbers, lambda x: x)


def _numbers(x: Tensor) -> Tensor:
    """What autograd is to keep: of a parameter, which has others afterwards, its numbers."""
    return x.detach() if isinstance(x, nn.Parameter) else x


def casts(model: nn.Module) -> bool:
    """Whether layers of the model widen their weights for each forward."""
    return any(map(_casts, model.modules()))


def _casts(module: nn.Module) -> bool:
    hooks = getattr(module, "_diffusers_hook", None)
    return hooks is not None and hooks.get_hook(CASTING) is not None
