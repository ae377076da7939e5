"""What every guidance must hold to: checks that a plugin's author runs on tiny real pipelines.

    from guidekit.testing import check_guidance
    check_guidance(Vignette)

Names are resolved on first use, as pytest imports this package before torch is needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "CHECKS": "suite",
    "check_guidance": "suite",
    "run_check": "suite",
    "sd_pipeline": "miniatures",
    "sdxl_pipeline": "miniatures",
}

__all__ = ["CHECKS", "check_guidance", "run_check", "sd_pipeline", "sdxl_pipeline"]

if TYPE_CHECKING:
    from guidekit.testing.miniatures import sd_pipeline, sdxl_pipeline
    from guidekit.testing.suite import CHECKS, check_guidance, run_check


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"guidekit.testing has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"guidekit.testing.{_HOME[name]}"), name)
