"""No step waits for the device: levels and moves are floats, tabulated before the first call."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

import guidekit
import tiny
from guidekit import Condition, Guidance, Sampling
from guidekit.backbones.loading import make_scheduler

# What makes the host wait for a tensor of a GPU.
READS = {"item", "cpu", "tolist", "numpy", "nonzero"}
READS |= {f"__{name}__" for name in ("bool", "int", "float", "index")}
PACKAGE = str(Path(guidekit.__file__).parent)
# Where levels and moves are found and used.
OURS = ("levels", "noise", "probe", "step", "sampler", "attached", "replay")
# On a CPU the injector reads at once whether a gradient is finite; on a GPU a step later.
OURS += ("acting", "rows", "engine", "evaluator", "calls", "hooks", "capture", "account")


class HostReads(TorchFunctionMode):
    """Counts the reads of tensors by guidekit's files; the scheduler's own are left out."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        to_cpu = name == "to" and "cpu" in map(str, [*args[1:], *(kwargs or {}).values()])
        by_tensor = name == "__getitem__" and isinstance(args[1], torch.Tensor) and not args[1].ndim
        if name in READS or to_cpu or by_tensor:
            frame = sys._getframe(1)
            while frame and not any(p in frame.f_code.co_filename for p in (PACKAGE, "diffusers")):
                frame = frame.f_back
            if frame and frame.f_code.co_filename.startswith(PACKAGE):
                path = Path(frame.f_code.co_filename)
                self.found[path.stem, name, frame.f_lineno] += 1
        return func(*args, **(kwargs or {}))


@dataclass(kw_only=True)
class Every(Guidance):
    """Uses all that a step says of its level and its move, for images of its choice."""

    graph: ClassVar[str] = "input"

    def acts_on(self, step):
        return torch.ones(1, dtype=torch.bool, device=step.z.device)

    def energy(self, step):
        return step.z.square().flatten(1).sum(1)

    def push(self, step, grad):
        level, move = step.level, step.move
        change = move.score(grad) + move.mean(grad) if level.a / level.norm > 1e-3 else 0
        change = change + move.shift(1e-3 * grad, once=True)
        if step.ends_step and step.frac < 0.5:
            change = change + move.shift(1e-3 * step.next_level.norm * grad)
        return change * (1e-3 * (move.reads_sample + move.noise_std + level.sigma < 1e9))


def test_the_counter_counts():
    x = torch.tensor([1.0, 2.0])

    def reads(do):
        with HostReads() as mode:
            # as if the line stood in the package
            exec(compile(do, f"{PACKAGE}/levels.py", "exec"), {"x": x, "torch": torch})
        return sum(mode.found.values())

    for line in ("x[0].item()", "float(x[0])", "bool(x[0])", "x.tolist()", "x.cpu()", "int(x[1])"):
        assert reads(line) == 1, line
    assert reads("x.to('cpu')") == 1
    assert reads("x[torch.tensor(1)]") == 1
    assert reads("x.to(torch.float64); x + 1; x[0]") == 0


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler", "heun", "unipc", "pndm", "ddpm"])
def test_no_step_reads_a_tensor_for_its_level_or_move(scheduler):
    pipe = tiny.sd_pipeline()
    options = {"seeds": [0], "steps": 6, "scheduler": make_scheduler(pipe, scheduler)}
    for guidances, files in (([], None), ([Every(scale=1e-3)], OURS)):
        steps = iter(Sampling(pipe, Condition("a red circle"), guidances, **options))
        next(steps)
        with HostReads() as mode:
            for _ in range(4):
                next(steps)
        assert not [key for key in mode.found if files is None or key[0] in files]


def test_neither_does_a_step_of_an_attached_pipeline():
    pipe = tiny.sd_pipeline()
    mode, seen = HostReads(), []

    def count(pipe, index, timestep, kwargs):  # from the second step on
        if index == 0:
            mode.__enter__()
        seen.append(index)
        return {}

    with guidekit.attach(pipe, [Every(scale=1e-3)]):
        try:
            pipe("a red circle", num_inference_steps=5, callback_on_step_end=count)
        finally:
            mode.__exit__(None, None, None)
    assert seen == [0, 1, 2, 3, 4]
    # The account is read at the end of the run, which lies before the last callback.
    assert not [key for key in mode.found if key[0] in OURS and key[0] != "account"]
