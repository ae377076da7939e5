"""Ctrl-C between two steps of a training, when weights and optimizer fit each other."""

import signal
import threading


class Interrupt:
    """Remembers Ctrl-C while the context is open; a second one ends the run at once.

    Only the main thread of Python is told of signals; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self._main = threading.current_thread() is threading.main_thread()
        # An ignored signal, as under nohup, stays ignored.
        self._main = self._main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _remember(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
