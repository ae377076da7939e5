"""A pixel diffusion model that makes, from one image, another with the same semantics.

Semantica: Kumar, Fischer, Greff, Weissenborn, Houlsby 2024, arXiv:2405.14857. Names are resolved on
first use, as image encoders take seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "AdapterOptions": "adapter_train.AdapterOptions",
    "SemanticaOptions": "train.SemanticaOptions",
    "adapter_task": "adapter_train.make",
    "scene_items": "sources.scene_items",
    "semantica_task": "train.make",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from guidekit.semantica.adapter_train import AdapterOptions
    from guidekit.semantica.adapter_train import make as adapter_task
    from guidekit.semantica.sources import scene_items
    from guidekit.semantica.train import SemanticaOptions
    from guidekit.semantica.train import make as semantica_task


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"guidekit.semantica has no {name!r}; it has {', '.join(__all__)}")
    module, _, own = _HOME[name].rpartition(".")
    return getattr(importlib.import_module(f"guidekit.semantica.{module}"), own)
