"""The weights whose loss on data that is held out is the lowest so far."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from guidekit.system.untrusted import read_weights
from guidekit.train.durable import put

FILE = "best.safetensors"


def offer(folder: Path, step: int, task: Any) -> None:
    """Keeps the task's weights of `step` if their loss on what is held out is the lowest so far.

    It is a function of the step alone, so a training that was killed keeps the same ones.
    """
    loss = task.held_out()
    if loss is None:
        return
    before = _facts(folder)
    # Those of later steps are left of a training of which the checkpoint after them was lost.
    if before is not None and before["step"] <= step and before["loss"] <= loss:
        return
    part = folder / f"{FILE}.part"
    state = {k: v.detach().cpu().contiguous() for k, v in task.net.state_dict().items()}
    save_file(state, part, metadata={"facts": json.dumps({"step": step, "loss": loss})})
    put(part, folder / FILE)


def _facts(folder: Path) -> dict[str, Any] | None:
    """Step and loss of the weights that are kept; None without any."""
    if not (folder / FILE).exists():
        return None
    with safe_open(folder / FILE, "pt") as file:
        return json.loads(file.metadata()["facts"])


def export_best(folder: Path, task: Any, out: Path) -> None:
    """Exports the task's model with the kept weights, if there are any, in place of its own."""
    if (folder / FILE).exists():
        task.net.load_state_dict(read_weights(folder / FILE))
    task.export(out)
