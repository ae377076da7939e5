"""Weights of tiny models: frozen, or random everywhere."""

import torch
from torch import nn


def frozen_model(model: nn.Module) -> nn.Module:
    """The model in eval mode, its weights without gradient."""
    return model.eval().requires_grad_(False)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random weights everywhere, also where its residual branches begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            std = 0.05 if p.ndim < 2 else (p[0].numel()) ** -0.5
            noise = torch.randn(p.shape, generator=generator) * std
            p.copy_(1 + noise if p.ndim == 1 and bool((p == 1).all()) else noise)
    return model.eval()
