"""LPIPS: how unlike two images look to a VGG16 that was weighed by people's judgements.

Zhang, Isola, Efros, Shechtman, Wang 2018 (arXiv:1801.03924), version 0.1 with VGG16. Weights are
one safetensors file with the names of torch-fidelity's `SampleSimilarityLPIPS`, which has them from
the authors; nothing is downloaded.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.models import vgg16

from guidekit.errors import GuidekitError
from guidekit.evaluate.judges import Judge
from guidekit.images import to_uint8
from guidekit.system.untrusted import read_weights
from guidekit.system.weights import weight_hashes

ENDS = (4, 9, 16, 23, 30)  # layers of VGG16 after which features are read, ReLUs all
CHANNELS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the authors, for [-1, 1]
KEPT = 16  # images whose features are kept while pairs are compared


class Lpips(nn.Module):
    """The network, on images (B, 3, H, W) in [-1, 1] of at least 16 pixels a side."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = vgg16(weights=None).features[: ENDS[-1]]
        self.weights = nn.ParameterList(torch.empty(1, c, 1, 1) for c in CHANNELS)

    def features(self, images: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) of five depths, each place of length 1."""
        mean, std = (images.new_tensor(v)[:, None, None] for v in (SHIFT, SCALE))
        x, found = (images - mean) / std, []
        for first, last in itertools.pairwise((0, *ENDS)):
            x = self.layers[first:last](x)
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def between(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Distances (B,) of features."""
        parts = zip(self.weights, a, b, strict=True)
        return sum((w * (x - y) ** 2).sum(1).mean((1, 2)) for w, x, y in parts)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of images, 0 of an image to itself."""
        return self.between(self.features(a), self.features(b))


@dataclass(frozen=True)
class Perceptual(Judge):
    """LPIPS by a file of weights."""

    network: Lpips

    def distance(self, a: Image, b: Image) -> float:
        """Of two images of one size."""
        return self._between(self._features(a), self._features(b))

    def spread(self, keys: list[str], image: Callable[[str], Image]) -> float:
        """Mean over the pairs of images of one condition, two or more of one size."""
        features = lru_cache(KEPT)(lambda key: self._features(image(key)))
        pairs = itertools.combinations(keys, 2)
        return float(np.mean([self._between(features(a), features(b)) for a, b in pairs]))

    def _features(self, image: Image) -> list[Tensor]:
        with torch.no_grad():
            return self.network.features(to_uint8(image)[None].float() / 127.5 - 1)

    def _between(self, a: list[Tensor], b: list[Tensor]) -> float:
        if a[0].shape != b[0].shape:
            raise GuidekitError("LPIPS compares images of one size; these have two")
        with torch.no_grad():
            return float(self.network.between(a, b))


def load_lpips(path: Path) -> Perceptual:
    """LPIPS with the weights of a safetensors file.

    Raises GuidekitError for no such file and for one that holds something else.
    """
    if not path.is_file():
        raise GuidekitError(f"LPIPS {path}: no such file; it is its weights as safetensors")
    found = {_ours(name): tensor for name, tensor in read_weights(path).items()}
    with torch.device("meta"):
        network = Lpips()
    try:
        network.load_state_dict(found, assign=True)
    except RuntimeError:
        raise GuidekitError(
            f"LPIPS {path}: not its weights, which are named lin0.model.1.weight, "
            "net.slice1.0.weight and so on"
        ) from None
    return Perceptual(str(path), weight_hashes(path), network.float().eval().requires_grad_(False))


def _ours(name: str) -> str:
    """Our name of torch-fidelity's `lin0.model.1.weight` or `net.slice1.0.weight`."""
    name = re.sub(r"^lin(\d)\.model\.1\.weight$", r"weights.\1", name)
    return re.sub(r"^net\.slice\d\.", "layers.", name)
