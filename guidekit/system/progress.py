"""How far a long work has come: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from types import TracebackType
from typing import Any

from guidekit.system.untrusted import printable

SECONDS = 15.0  # between two lines, where there is no terminal


class Progress:
    """Tells how many of `total` units of a work are done.

    On a terminal and in a notebook it is a bar on stderr; logs of batch jobs and pipes get lines on
    stdout, at least `seconds` apart. name: what is done, such as "drawing". unit: what is counted.
    done: how many were done before. silent: nothing is told. leave: the bar stays at the end.
    """

    def __init__(
        self,
        name: str = "drawing",
        unit: str = "step",
        total: int | None = None,
        done: int = 0,
        silent: bool = False,
        seconds: float | None = None,
        leave: bool = True,
    ):
        self.name, self.unit, self.total = printable(name), unit, total
        self.silent, self.seconds = silent, SECONDS if seconds is None else seconds
        self._first, self._done = done, done
        self._told = self._started = time.monotonic()
        self._bar: Any = None
        if not silent and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm.auto import tqdm

            kind = {"desc": self.name, "unit": f" {unit}s", "leave": leave}
            self._bar = tqdm(total=total, initial=done, **kind)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int | None = None, words: str = "") -> None:
        """Tells that `done` units are done, of `total` where that changed; words: what else."""
        self._done, self.total = done, total or self.total
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(done - self._bar.n)
        elif not self.silent and time.monotonic() - self._told >= self.seconds:
            self._told = time.monotonic()
            print(self._line(words), flush=True)

    def add(self, count: int = 1) -> None:
        """Tells that `count` more units are done."""
        self(self._done + count)

    def _line(self, words: str) -> str:
        """Units done, what else there is to say, the seconds spent and those that are left."""
        spent, new = self._told - self._started, self._done - self._first
        parts = [f"{self.name:8} {self.unit} {self._done}", words, f"{spent:.0f} s"]
        if self.total:
            parts[0] += f" of {self.total}"
            parts.append(f"about {spent / max(new, 1) * (self.total - self._done):.0f} s left")
        return ", ".join(filter(None, parts))
