"""The inputs of one step after another, made ahead by worker processes where they are asked for."""

import multiprocessing
import signal
from collections.abc import Iterable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from guidekit.errors import GuidekitError


class Source(Protocol):
    """What makes batches. `encodes = True` says that it takes a network to; it may be left out."""

    def batch(self, numbers: range, generator: torch.Generator) -> dict[str, Tensor]:
        """Inputs of one process for one step, from the numbers of its scenes."""


class _Turns(Dataset):
    """Batches by their number in this process, of which and of the seed they are a function."""

    def __init__(self, task: Source, size: int, seed: int, accelerator: Accelerator):
        self.task, self.size, self.seed = task, size, seed
        self.processes, self.process = accelerator.num_processes, accelerator.process_index

    def __getitem__(self, turn: int) -> dict[str, Tensor]:
        index = turn * self.processes + self.process
        generator = torch.Generator().manual_seed(hash((self.seed, index)) % 2**63)
        return self.task.batch(range(index * self.size, (index + 1) * self.size), generator)


def batches(
    task: Source, size: int, seed: int, accelerator: Accelerator, turns: range, workers: int
) -> Iterable[dict[str, Tensor]]:
    """This process's batches of the given turns, in their order, the same for every `workers`.

    workers: processes that make them; 0 for none but this one. Raises GuidekitError for a task that
    makes its batches with a network, which workers do not share, and where processes cannot fork.
    """
    workers = min(workers, len(turns))
    if workers and getattr(task, "encodes", False):
        raise GuidekitError("this task makes its batches with a network; it takes workers = 0")
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise GuidekitError("workers are forked, which this system cannot do; take workers = 0")
    return DataLoader(
        _Turns(task, size, seed, accelerator),
        batch_size=None,
        sampler=turns,
        num_workers=workers,
        pin_memory=workers > 0 and accelerator.device.type == "cuda",
        multiprocessing_context="fork" if workers else None,  # the task is not pickled
        worker_init_fn=_leave_signals_to_the_loop,
        generator=torch.Generator(),  # not the global one, which first weights are drawn from
    )


def _leave_signals_to_the_loop(worker: int) -> None:
    """A terminal and Slurm send them to every process, and the loop still finishes its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
