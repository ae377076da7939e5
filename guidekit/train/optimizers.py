"""The optimizer that a stage's options name."""

import torch
from torch import nn

from guidekit.train.muon import Muon
from guidekit.train.options import Options


def make_optimizer(net: nn.Module, options: Options, on_gpu: bool) -> torch.optim.Optimizer:
    """What the options name, over the weights that are trained."""
    shared = {"lr": options.lr, "betas": (0.9, 0.99), "eps": options.eps}
    shared |= {"weight_decay": options.weight_decay}
    if options.optimizer == "muon":
        return Muon(net, **shared)
    weights = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.AdamW(weights, **shared, fused=on_gpu or None)
