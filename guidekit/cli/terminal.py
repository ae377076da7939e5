"""What commands print: lines, counts, and how far a run has come."""

import sys
import time
from typing import Any

import click

from guidekit.untrusted import printable

SECONDS = 15.0  # between two lines of progress, where there is no terminal


def say(text: str, err: bool = False) -> None:
    """Prints lines; every command's own words go through here, so that none steers a terminal."""
    click.echo(printable(text), err=err)


def images(count: int, kind: str = "") -> str:
    """A number of images in words, such as `1 image` or `3 finished images`."""
    return f"{count} {kind}{' ' if kind else ''}image{'' if count == 1 else 's'}"


class Progress:
    """How far a run has come: a bar on a terminal, elsewhere a line now and then.

    Logs of batch jobs and pipes get the lines, at least `seconds` apart.
    """

    def __init__(self, silent: bool = False, seconds: float = SECONDS, unit: str = "step"):
        self.silent, self.seconds, self.unit = silent, seconds, unit
        self._bar: Any = None
        self._told = self._started = time.monotonic()
        if not silent and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc="drawing", unit=unit, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """Tells that `done` of `total` steps, or whatever the unit is, are done."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif not self.silent and time.monotonic() - self._told >= self.seconds:
            self._told = time.monotonic()
            spent = self._told - self._started
            left = spent / done * (total - done)
            say(f"{self.unit:<9}{done} of {total}, {spent:.0f} s, about {left:.0f} s left")
