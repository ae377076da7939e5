"""Peak memory of a stretch of code: CUDA's own count, else the growth of the resident set."""

import os
import threading

import torch


class PeakMemory:
    """Watches memory inside `with`; `mebibytes` is the peak over what was in use at the start."""

    def __enter__(self) -> "PeakMemory":
        self.mebibytes = 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        self._start, self._peak = _resident(), 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, _resident())

    def __exit__(self, *error) -> None:
        if torch.cuda.is_available():
            self.mebibytes = (torch.cuda.max_memory_allocated() - self._start) / 2**20
            return
        self._done.set()
        self._watcher.join()
        self.mebibytes = (max(self._peak, _resident()) - self._start) / 2**20


def _resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
