"""Plans of few small images, and what their folders hold."""

import json
from pathlib import Path

from click.testing import CliRunner

from guidekit.__main__ import main

PROMPT = "a red circle and a blue square"


def run(*args):
    """The result of a command given as words."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def write_plan(path: Path, model, **values) -> Path:
    """A plan of one step an image."""
    sample = {"model": str(model), "prompt": PROMPT, "steps": 1} | values.pop("sample", {})
    path.write_text(json.dumps({"sample": sample, "block": 2} | values))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The files of all blocks by name."""
    places = sorted(folder.glob("[0-9]*"))
    files = [f for place in places for f in ([place] if place.is_file() else place.iterdir())]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}
