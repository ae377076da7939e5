"""A training that is stopped and goes on ends in the same numbers, bit for bit, for every task."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from guidekit.train.loop import Loop, Options
from guidekit.train.recipe import TASKS, task_kind, train

K = 2  # steps before and after the stop

TINY = {
    "vae": dict(channels=(8, 16, 16), crop=16),
    "text": dict(width=16, layers=1, heads=2),
    "denoiser": dict(channels=(16, 32), heads=(1, 2), pool=8),
    "pixels": dict(data="digits", channels=(16, 32), dropout=0.3),
    "clip": dict(width=16, layers=1, heads=2, embedding=16, text_width=16, text_layers=1, patch=8),
    "noisy-clip": dict(base="small-clip", width=16),
    "judge": dict(width=8),
    "digits": dict(width=8, features=8),
    "semantica": dict(pages=6, per_page=3, low=-2.0, high=2.0),
    "adapter": dict(pages=6, per_page=3, low=-2.0, high=2.0),
    "tags": dict(heads=2),
    "maps": dict(channels=(16, 32), head=8, groups=8),
    "control": dict(kind="controlnet", embedding=(16, 32)),
    "spatial": dict(pairs=2),
}

EARLIER = """
model = "small"
size = 32
[[stage]]
task = "vae"
channels = [8, 16, 16]
crop = 16
steps = 1
batch = 2
[[stage]]
task = "text"
width = 16
layers = 1
heads = 2
steps = 1
batch = 2
[[stage]]
name = "small-clip"
task = "clip"
width = 16
layers = 1
heads = 2
embedding = 16
text_width = 16
text_layers = 1
text_heads = 2
patch = 8
steps = 1
batch = 4
"""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A run's folder with what the later tasks read."""
    out = tmp_path_factory.mktemp("earlier")
    (out / "small.toml").write_text(EARLIER)
    train(out / "small.toml", out, quiet=True)
    return out / "small"


def loop_of(task, own, folder, earlier, model, encoder):
    kind, make = task_kind(task)
    size = {"digits": 8, "pixels": 8, "semantica": 16, "adapter": 16}.get(task, 32)
    if task == "noisy-clip":
        own = own | {"base": str(earlier / "small-clip/model")}
    if task in ("semantica", "adapter", "tags"):
        own = own | {"encoder": str(encoder)}
    if task in ("adapter", "control", "spatial"):
        own = own | {"backbone": str(model)}
    if task == "clip":
        own = own | {"text_heads": 2}
    torch.manual_seed(0)
    made = make(kind(**own), earlier, size, True)
    options = Options(steps=2 * K, batch=4, log_every=1, preview_every=100, warmup=2)
    return Loop(made, options, folder, quiet=True)


def stopped_after(loop, steps):
    """Ctrl-C while the batch of a step is made, so that the loop ends after it."""
    batch = loop.task.batch

    def interrupted(numbers, generator):
        if numbers.start // len(numbers) == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(numbers, generator)

    loop.task.batch = interrupted
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert loop.step == steps


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("small_uvit")
def test_stopped_and_resumed_is_the_whole_training(task, earlier, model, encoder, tmp_path):
    given = (earlier, model, encoder)
    loop_of(task, TINY[task], tmp_path / "whole", *given).run()
    stopped_after(loop_of(task, TINY[task], tmp_path / "cut", *given), K)
    torch.rand(7)  # what else draws in the process has no part in it
    again = loop_of(task, TINY[task], tmp_path / "cut", *given)
    assert again.step == K
    again.run()
    one, two = (load_file(tmp_path / n / "checkpoint.safetensors") for n in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert any(k.startswith("adam") for k in one)
    different = [k for k in one if not torch.equal(one[k], two[k])]
    assert not different
    start = load_file(tmp_path / "cut/checkpoint-before.safetensors")
    assert any(not torch.equal(start[k], two[k]) for k in one if k.startswith("weight"))
