"""Our extractors for torch-fidelity, whose own read pickles and download.

from guidekit.evaluate.fidelity import register
name = register("scenes-judge")
torch_fidelity.calculate_metrics(input1=A, input2=B, feature_extractor=name, fid=True, cuda=False)
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from guidekit.evaluate.judges import Extractor, load_extractor

LAYER = "features"


def register(name: str) -> str:
    """Registers an extractor of `load_extractor`; returns its name in torch-fidelity.

    Raises GuidekitError as `load_extractor`.
    """
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    extractor = load_extractor(name)
    label = f"guidekit-{name.replace('/', '-')}-{min(extractor.hashes)[:8]}"
    if label not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(label, _adapter(extractor, FeatureExtractorBase))
    return label


def _adapter(extractor: Extractor, base: type) -> type:
    """A class of theirs that reads by an extractor of ours."""

    class Adapter(base):
        """Images as uint8 (n, 3, H, W) to features (n, d)."""

        def __init__(self, name: str, features_list: list[str], **_: object):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (LAYER,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return LAYER

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, 64, 64, dtype=torch.uint8)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            shown = [Image.fromarray(i.permute(1, 2, 0).cpu().numpy()) for i in images]
            found = np.concatenate([extractor.read([image]) for image in shown])
            return (torch.from_numpy(found),)

    return Adapter
