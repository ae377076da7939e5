"""Cells of a benchmark as files, so that a stopped run goes on; tables."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np


class Store:
    """Arrays of finished cells; a cell is a method, a setting and a draw of the shots."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def cell(self, key: dict, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a cell, computed if they are not there."""
        text = json.dumps(key, sort_keys=True)
        name = f"{key['method']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.npz"
        path = self.folder / name.replace(" ", "-").replace("/", "-")
        if not path.exists():
            click.echo(f"drawing {text}", err=True)
            arrays = make()
            part = path.with_suffix(".part.npz")
            np.savez_compressed(part, **arrays)
            part.replace(path)
        with np.load(path) as found:
            return {k: found[k] for k in found.files}


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table with the intervals in brackets."""
    names = [k for k in rows[0] if not k.endswith("95%")]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(_text(row, name) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _text(row: dict, name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, float):
        return str(value)
    interval = row.get(f"{name} 95%")
    return f"{value:.3f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
