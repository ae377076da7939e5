"""Ctrl-C, SIGTERM and the time end a training between two steps, in all processes alike."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from torch import nn

from guidekit.train.interrupt import Agreement, Interrupt, Stop
from guidekit.train.loop import Loop
from guidekit.train.options import Options

SCRIPT = Path(__file__).parents[1] / "support/two_ranks.py"


def two_processes(folder, number, rank):
    """What both ranks of a training said when a signal reached one of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(random.Random().randint(20000, 50000))]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), number, str(rank)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\w+) (\S*) first=(\d+) last=(\d+) mask=(\S+)", done.stdout)
    assert len(found) == 2, done.stdout + done.stderr
    return found, done.stderr


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    ctrl_c, _ = two_processes(tmp_path, "SIGINT", rank=1)
    assert [row[:4] for row in ctrl_c] == [("KeyboardInterrupt", "", "0", "20")] * 2
    term, said = two_processes(tmp_path, "SIGTERM", rank=0)
    assert [row[:4] for row in term] == [("SystemExit", "0", "20", "40")] * 2
    assert said.count(f"stopped  {tmp_path} at step 40 of 60 by SIGTERM") == 1
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert file.metadata()["step"] == "40"
    assert ctrl_c[0][4] != ctrl_c[1][4]  # each rank draws its own dropout


class Square(nn.Module):
    """A weight; the gradient is nan where the batch says so, under a loss that is not."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x, bad):
        loss = (self.w * x).square().mean()
        zero = (self.w - self.w.detach()).square().sum().sqrt()  # its slope at 0 is 0 / 0
        return {"loss": loss + zero if bad.any() else loss}


class SquareTask:
    """Steps whose number is in `bad` have no gradient; `at` does something as a step begins."""

    def __init__(self, bad=(), at=None):
        self.net, self.bad, self.at = Square(), bad, at or (lambda step: None)

    def batch(self, numbers, generator):
        step = numbers.start // len(numbers)
        self.at(step)
        bad = torch.tensor([step in self.bad])
        return {"x": torch.randn(4, generator=generator), "bad": bad}

    def preview(self):
        return Image.new("RGB", (2, 2))

    def export(self, folder):
        pass


def loop_of(task, folder, **changes):
    options = dict(steps=12, batch=4, save_every=100, log_every=1, preview_every=100, warmup=0)
    return Loop(task, Options(**options | changes), folder, quiet=True)


def test_sigterm_saves_and_exits_with_nothing_wrong(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    send = {3: signal.SIGTERM}
    loop = loop_of(SquareTask(at=lambda s: s in send and os.kill(os.getpid(), send[s])), tmp_path)
    with pytest.raises(SystemExit) as ended:
        loop.run()
    assert ended.value.code == 0
    assert "by SIGTERM" in capsys.readouterr().err
    assert loop_of(SquareTask(), tmp_path).step == 4
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_in_the_last_step_is_not_lost(tmp_path):
    task = SquareTask(at=lambda s: s == 11 and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        loop_of(task, tmp_path).run()
    assert loop_of(SquareTask(), tmp_path).step == 12


def test_one_ctrl_c_that_comes_twice_is_one_and_a_second_ends_at_once(monkeypatch):
    from guidekit.train import interrupt

    with Interrupt() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as from a terminal and from its launcher
        assert signals.asked == Stop.INT
        monkeypatch.setattr(interrupt, "BOTH_WAYS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_the_strongest_reason_counts_and_time_ends_a_training():
    alone = Accelerator()
    assert Agreement(alone, 10, minutes=1e9).reached(3, Stop.NOT) == Stop.NOT
    assert Agreement(alone, 10, minutes=-1.0).reached(3, Stop.NOT) == Stop.TIME
    assert Agreement(alone, 10, minutes=-1.0).reached(3, Stop.TERM) == Stop.TERM
