"""The built-in models: their tuned settings, and whether every file is as it was shipped.

`python -m guidekit.zoo.shipped` writes the list anew, after a model was added or trained again.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ZOO = Path(__file__).parent
DEFAULT = "objects"  # the model of who names none
REPAIR = (
    "reinstall guidekit (pip install --force-reinstall --no-deps guidekit), or in a checkout: "
    "git restore guidekit/zoo"
)


def model_defaults(name: str) -> dict[str, Any]:
    """A built-in's tuned settings: `steps`, `cfg`, and `plugin` tables; empty for other models."""
    path = ZOO / name / "defaults.json"
    return json.loads(path.read_text()) if path.exists() else {}


def example_layout(name: str) -> Path:
    """The layout that a model draws for who asks for nothing: its own, else the default model's."""
    own = ZOO / name / "example" / "layout.json"
    return own if own.exists() else ZOO / DEFAULT / "example" / "layout.json"


def tuned_options(own: Mapping[str, Any], plugin: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A plugin's options out of a model's tuned settings, for those that are not given.

    None beside a preset, which is a setting of its own.
    """
    found = own.get("plugin", {}).get(plugin, {})
    return {} if given.get("preset") else {k: v for k, v in found.items() if k not in given}


def tuned_for(plugin: str) -> dict[str, dict[str, Any]]:
    """A plugin's tuned options by the built-in model that they are for."""
    found = {path.parent.name: json.loads(path.read_text()) for path in ZOO.glob("*/defaults.json")}
    return {
        model: own["plugin"][plugin]
        for model, own in sorted(found.items())
        if plugin in own.get("plugin", {})
    }


def file_hashes(zoo: Path = ZOO) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of every model folder: {model: {path in it: hash}}."""
    return {
        folder.name: {
            file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        for folder in sorted(zoo.iterdir())
        if folder.is_dir() and not folder.name.startswith("_")
    }


def shipped_hashes(zoo: Path = ZOO) -> dict[str, dict[str, str]]:
    """The list that was shipped; empty if it is missing."""
    path = zoo / "hashes.json"
    return json.loads(path.read_text()) if path.exists() else {}


def damages(zoo: Path = ZOO) -> dict[str, str]:
    """What is wrong with each built-in model and how to repair it; "" for an intact one."""
    shipped, found = shipped_hashes(zoo), file_hashes(zoo)
    states = {}
    for model in sorted(shipped.keys() | found.keys()):
        wanted, there = shipped.get(model, {}), found.get(model, {})
        wrong = [
            f"{file} is {'damaged' if file in there else 'missing'}"
            for file, value in wanted.items()
            if there.get(file) != value
        ]
        if not wanted:
            wrong = ["its hashes were not shipped"]
        states[model] = f"{', '.join(wrong)}; {REPAIR}" if wrong else ""
    return states


if __name__ == "__main__":
    (ZOO / "hashes.json").write_text(json.dumps(file_hashes(), indent=1) + "\n")
