"""Results of a benchmark on disk: rows and what they were measured on, in one form for all.

A file is written after every row, so that a run cut short keeps its rows. docs/tables.py makes the
tables of the pages of it.
"""

import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch

import guidekit


class Results:
    """Rows of one measurement and what they were measured on; `finish` marks it as done.

    `about` says what the rows share: n, seeds (the first and the last), steps, cfg, batch, model.
    path None prints only. With `resume` the rows of a run that was cut short stay, if it was of the
    same versions and `about`.
    """

    def __init__(self, path: str | Path | None, *, resume: bool = False, **about: Any):
        self.path = None if path is None else Path(path)
        cuda = torch.cuda.is_available()
        self.facts: dict[str, Any] = dict(
            about,
            command=command(sys.argv),
            threads=torch.get_num_threads(),
            cores=os.cpu_count(),
            machine=platform.machine(),
            device=torch.cuda.get_device_name() if cuda else "cpu",
            capability=torch.cuda.get_device_capability() if cuda else None,
            guidekit=guidekit.__version__,
            torch=torch.__version__,
            diffusers=diffusers.__version__,
            triton=_triton(),
            date=time.strftime("%F"),
            finished=False,
            said=[],
            rows=[],
        )
        if resume and self.path is not None and self.path.exists():
            self.facts["rows"] = self._kept(json.loads(self.path.read_text()), [*about])
        self._write()

    @property
    def rows(self) -> list[dict]:
        """The rows so far."""
        return self.facts["rows"]

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, row: dict) -> None:
        """One more row, printed and written."""
        print(json.dumps(row), flush=True)
        self.extend([row])

    def extend(self, rows: Iterable[dict]) -> None:
        """More rows, written."""
        self.rows.extend(rows)
        self._write()

    def say(self, *lines: str) -> None:
        """What the rows show, in sentences; printed, and written with them."""
        print("\n" + "\n".join(lines), flush=True)
        self.facts["said"] += lines
        self._write()

    def finish(self) -> None:
        """All rows are there."""
        self.facts["finished"] = True
        self._write()

    def _kept(self, facts: dict, about: list[str]) -> list[dict]:
        names = [*about, "guidekit", "torch", "diffusers"]
        same = all(facts.get(name) == self.facts[name] for name in names)
        return facts["rows"] if same and not facts["finished"] else []

    def _write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.facts, indent=1) + "\n")
            part.replace(self.path)


def apart(function: Callable, *arguments: Any) -> Any:
    """What a function gives in a fresh process with one thread, so that memory starts anew."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) as pool:
        return pool.submit(function, *arguments).result()


def rows_of(path: str | Path) -> list[dict]:
    """The rows that a benchmark wrote."""
    return json.loads(Path(path).read_text())["rows"]


def command(argv: list[str]) -> str:
    """The command line, without the file of the results and without folders of this machine."""
    words = [word for i, word in enumerate(argv[1:]) if "--json" not in (word, argv[i])]
    words = [Path(word).name if os.path.isabs(word) else word for word in words]
    return shlex.join(["python", f"benchmarks/{Path(argv[0]).name}", *words])


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
