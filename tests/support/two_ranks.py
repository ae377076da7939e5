"""A training of two processes for torchrun: two_ranks.py FOLDER SIGNAL RANK-IT-IS-SENT-TO."""

import os
import signal
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from guidekit.train.loop import Loop
from guidekit.train.options import Options

FOLDER, SIGNAL, RANK = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
AT = 13  # of the steps since the start


class Net(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.masks = []

    def forward(self, x):
        if self.training:
            self.masks.append(torch.get_rng_state()[:64].tolist())
        return {"loss": self.net(x).square().mean()}


class Task:
    """Noise in; one of the processes is sent the signal while it makes a batch."""

    def __init__(self):
        torch.manual_seed(0)
        self.net, self.made = Net(), 0

    def batch(self, numbers, generator):
        self.made += 1
        if int(os.environ["RANK"]) == RANK and self.made == AT:
            os.kill(os.getpid(), getattr(signal, SIGNAL))
        return {"x": torch.randn(4, 8, generator=generator)}

    def preview(self):
        return Image.new("RGB", (2, 2))

    def export(self, folder):
        pass


options = Options(steps=60, batch=4, save_every=1000, log_every=1000, preview_every=1000)
task = Task()
loop = Loop(task, options, FOLDER, quiet=True)
first = loop.step
try:
    loop.run()
except BaseException as error:
    # One write, so that two processes' lines do not mix.
    said = f"{type(error).__name__} {error} first={first} last={loop.step} "
    sys.stdout.write(f"{said}mask={hash(tuple(task.net.masks[-1]))}\n")
    sys.stdout.flush()
    if isinstance(error, KeyboardInterrupt):
        sys.exit(0)
    raise
