"""What ends a training between two steps: Ctrl-C, SIGTERM, the time; for all processes alike."""

import enum
import math
import signal
import threading
import time

import torch
from accelerate import Accelerator

BOTH_WAYS = 1.0  # seconds within which a terminal's and a launcher's copy of one signal come


class Stop(enum.IntEnum):
    """Why a training ends early; of several reasons the largest counts."""

    NOT = 0
    TIME = 1  # the options' minutes are spent: the training ends as if it were done
    TERM = 2  # SIGTERM, as Slurm sends it before the end of a job's time: save, exit with 0
    INT = 3  # Ctrl-C: save, KeyboardInterrupt


SIGNALS = {signal.SIGINT: Stop.INT, signal.SIGTERM: Stop.TERM}


class Interrupt:
    """Remembers SIGINT and SIGTERM while the context is open; a second Ctrl-C ends it at once.

    Only the main thread of Python is told of signals; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self.asked = Stop.NOT
        self._at = -math.inf

    def __enter__(self) -> "Interrupt":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # An ignored signal, as SIGINT is under nohup, stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.asked == Stop.INT and now - self._at > BOTH_WAYS:
            raise KeyboardInterrupt
        if SIGNALS[number] > self.asked:
            self.asked, self._at = SIGNALS[number], now


class Agreement:
    """Whether to stop, decided by all processes together after every `every`-th step.

    A process that is alone decides after each.
    """

    def __init__(self, accelerator: Accelerator, every: int, minutes: float):
        self.accelerator, self.minutes = accelerator, minutes
        self.every = every if accelerator.num_processes > 1 else 1
        self.started = time.monotonic()

    def reached(self, step: int, asked: Stop) -> Stop:
        """The reason to stop after `step` steps, the same in every process."""
        if step % self.every:
            return Stop.NOT
        spent = time.monotonic() - self.started > self.minutes * 60
        own = max(asked, Stop.TIME if spent else Stop.NOT)
        if self.accelerator.num_processes == 1:
            return own
        votes = torch.zeros(len(Stop), device=self.accelerator.device)
        votes[own] = 1
        votes = self.accelerator.reduce(votes, "sum")
        return Stop(int(votes.nonzero().max()))
