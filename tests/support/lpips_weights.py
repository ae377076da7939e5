"""Random weights in the form of torch-fidelity's LPIPS, in the place of those that it downloads."""

import types

import torch
from torch import Tensor
from torchvision.models import vgg

SIZES = (64, 128, 256, 512, 512)
ENDS = (4, 9, 16, 23, 30)


def random_lpips() -> tuple[torch.nn.Sequential, dict[str, Tensor]]:
    """The layers of VGG16, and the weights of `SampleSimilarityLPIPS` with these."""
    torch.manual_seed(0)
    layers, found = vgg.make_layers(vgg.cfgs["D"]), {}
    for name, tensor in layers.state_dict().items():
        part = sum(int(name.split(".")[0]) >= end for end in ENDS)
        # A quiet network would tell no image from another.
        found[f"net.slice{part + 1}.{name}"] = tensor * (3 if tensor.ndim > 1 else 1)
    found |= {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate(SIZES)}
    return layers, found


def nothing_downloaded(monkeypatch, theirs) -> None:
    """Gives torch-fidelity's module the random weights where it would download its own."""
    layers, found = random_lpips()
    linear = {name: tensor for name, tensor in found.items() if name.startswith("lin")}
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: linear)
    monkeypatch.setattr(
        theirs, "torchvision_load_pretrained_vgg16", lambda: types.SimpleNamespace(features=layers)
    )
