"""Results of a benchmark on disk, written row by row so that a run cut short keeps its rows."""

import json
import time
from pathlib import Path
from typing import Any

import torch


class Results:
    """Rows of one part and what they were measured on; `finish` marks the part as done.

    path None prints only.
    """

    def __init__(self, path: str | Path | None, **about: Any):
        self.path = None if path is None else Path(path)
        cuda = torch.cuda.is_available()
        self.facts: dict[str, Any] = dict(
            about,
            device=torch.cuda.get_device_name() if cuda else "cpu",
            capability=torch.cuda.get_device_capability() if cuda else None,
            torch=torch.__version__,
            triton=_triton(),
            date=time.strftime("%F"),
            finished=False,
            rows=[],
        )
        self._write()

    @property
    def rows(self) -> list[dict]:
        """The rows so far."""
        return self.facts["rows"]

    def add(self, row: dict) -> None:
        """One more row, printed and written."""
        print(json.dumps(row), flush=True)
        self.rows.append(row)
        self._write()

    def finish(self) -> None:
        """All rows are there."""
        self.facts["finished"] = True
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.facts, indent=1) + "\n")


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
