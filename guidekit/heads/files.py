"""The folder of a head of any kind: its weights, and a table that says what they are."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

WEIGHTS, CONFIG = "head.safetensors", "head.json"


def write_head(folder: str | Path, head: nn.Module, config: Any, number: int) -> Path:
    """Writes head.safetensors and head.json, a dataclass, in format `number` into a new folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    table = {"format": number, **dataclasses.asdict(config)}
    (folder / CONFIG).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return folder
