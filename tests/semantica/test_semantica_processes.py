"""Semantica's trainer in several processes: they train as one, in copies and in shards."""

import multiprocessing
import os
import random
import subprocess
import sys
from functools import partialmethod

import pytest
import torch

from guidekit.errors import GuidekitError
from guidekit.train.loop import Loop
from guidekit.train.processes import processes
from guidekit.train.recipe import train
from semantica_tiny import losses, write

pytestmark = pytest.mark.usefixtures("small_uvit")


def joint(rank, port, recipe, out, sharded):
    """One of two processes of a run."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    if sharded:
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "TransformerBlock,ConvBlock",
        }
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    state = processes()
    assert state.num_processes == 2
    if sharded:  # accelerate shards on GPUs alone, though gloo can
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    # Without inductor, which takes minutes and has no part in what is asked.
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    run = Loop.run

    def checked(loop):
        assert loop.sharded == sharded
        run(loop)

    Loop.run = checked
    train(recipe, out, quiet=True)


def run_two(recipe, out, sharded=False):
    port = random.Random().randint(20000, 50000)
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=joint, args=(rank, port, recipe, out, sharded)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    return losses(out)


def test_two_processes_train_as_one_with_twice_the_batches(encoder, tmp_path):
    """Their gradients are averaged: as one process that accumulates two batches."""
    two = run_two(write(tmp_path / "r.toml", encoder, steps=3), tmp_path / "two")
    one = train(
        write(tmp_path / "s.toml", encoder, steps=3, accumulate=2), tmp_path / "one", quiet=True
    )
    from safetensors.torch import load_file

    name = "unet/diffusion_pytorch_model.safetensors"
    first = load_file(one / name)
    second = load_file(tmp_path / "two/small/semantica/model" / name)
    for key, value in first.items():
        torch.testing.assert_close(second[key].float(), value.float(), atol=2e-3, rtol=2e-2)
    assert [step for step, _ in two] == [1, 2, 3]


@pytest.mark.slow
def test_the_command_line_trains_in_two_processes(encoder, tmp_path):
    """As torchrun starts them; one of them encodes, saves and logs."""
    write(tmp_path / "r.toml", encoder, steps=3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["guidekit", "train", str(tmp_path / "r.toml"), "--out"]
    port = str(random.Random().randint(20000, 50000))
    for name in ("one", "two"):
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": port}
        extra = ["--master-port", port]
        done = subprocess.run(
            [*command[:3], *extra, *command[3:], str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
    assert [step for step, _ in losses(tmp_path / "one")] == [1, 2, 3]
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_processes_that_would_not_train_together_are_refused(monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(GuidekitError, match="set ACCELERATE_USE_CPU=true"):
        processes()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "precision, close, compiled",
    [
        pytest.param("no", 1e-3, "false", id="float32"),
        pytest.param("bf16", 0.02, "false", marks=pytest.mark.slow, id="bf16"),
        pytest.param("no", 1e-3, "true", marks=pytest.mark.slow, id="compiled"),
    ],
)
def test_shards_of_fsdp2_train_as_copies_do(encoder, tmp_path, precision, close, compiled):
    options = {"precision": f'"{precision}"', "compile": compiled}
    recipe = write(tmp_path / "r.toml", encoder, steps=3, **options)
    copies, shards = (run_two(recipe, tmp_path / str(s), s) for s in (False, True))
    for (_, a), (_, b) in zip(copies, shards, strict=True):
        assert a == pytest.approx(b, rel=close)
