"""results.json and results.md: rows, what measured them, and everything that they depend on."""

import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

from guidekit.outputs.folders import versions

PACKAGES = ("guidekit", "torch", "transformers", "open_clip_torch", "torch-fidelity", "numpy")
FORMAT = 1


class Results:
    """What a command of `guidekit eval` found."""

    def __init__(self, command: str, **facts: Any):
        self.command, self.facts = command, facts
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._started = time.monotonic()

    def table(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            "format": FORMAT,
            "command": self.command,
            "words": sys.argv[1:],
            **self.facts,
            "rows": self.rows,
            "notes": self.notes,
            "seconds": round(time.monotonic() - self._started, 3),
            "peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "versions": versions(PACKAGES) | {"python": platform.python_version()},
        }

    def markdown(self) -> str:
        """Rows as a table, intervals in brackets; the notes below."""
        names: list[str] = []
        for row in self.rows:
            names += [k for k in row if not k.endswith("95%") and k not in names]
        lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        lines += ["| " + " | ".join(_cell(row, name) for name in names) + " |" for row in self.rows]
        return "\n".join(lines + [""] * bool(self.notes) + self.notes)

    def write(self, folder: Path) -> None:
        """Writes both files into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(
            json.dumps(self.table(), indent=1, allow_nan=False) + "\n"
        )
        (folder / "results.md").write_text(self.markdown() + "\n")


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, float):
        return str(value)
    bounds = row.get(f"{name} 95%")
    return f"{value:.3f}" + ("" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]")
