"""Where a pass of the kernels' check is remembered: a file in the user's cache.

Its name says what was checked, so that another GPU, torch, triton, ptxas or kernel is checked anew.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from guidekit_kernels import ptxas


def identity() -> str:
    """What a pass holds for: GPU, torch, triton, ptxas and the kernels' own files."""
    import triton

    folder = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    facts = [
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        torch.__version__,
        triton.__version__,
        ptxas.version(),
        hashlib.sha256(sources).hexdigest(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def passed() -> Path:
    """The file whose existence says that the check has passed here."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "guidekit" / "kernels" / identity()
