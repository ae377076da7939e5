"""A plan drawn by several processes, which are killed: the same bytes, nothing lost or doubled."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from plans import contents, run, write_plan

FORK = multiprocessing.get_context("fork")


def draw(plan, out, *words, limit=None):
    """What one of the processes does: the command, with a limit on the size of a file."""
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = run("sample", "--plan", plan, "--out", out, "--quiet", *words)
    if done.exit_code:
        print(done.stderr, file=sys.stderr)
    os._exit(done.exit_code)


def start(*args, **values):
    process = FORK.Process(target=draw, args=args, kwargs=values)
    process.start()
    return process


def codes(*processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.fixture
def plan(model, tmp_path):
    """Twenty images of two steps, in blocks of two, guided."""
    return write_plan(
        tmp_path / "p.json",
        model,
        count=20,
        sample={"steps": 2},
        segment=[{"phrase": "red circle", "box": [0, 0, 0.5, 1]}],
        plugin={"zest": {}},
    )


@pytest.mark.parametrize("form", ["folders", "tars"])
def test_two_processes_draw_the_bytes_of_one(model, tmp_path, plan, form):
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"form": form}))
    assert codes(start(plan, tmp_path / "one")) == [0]
    assert codes(start(plan, tmp_path / "two"), start(plan, tmp_path / "two")) == [0, 0]
    shards = [start(plan, tmp_path / "three", "--shard", f"{i}/3") for i in (1, 2, 3)]
    assert codes(*shards) == [0, 0, 0]
    one = contents(tmp_path / "one")
    assert len(one) == (10 if form == "tars" else 60)
    assert contents(tmp_path / "two") == contents(tmp_path / "three") == one
    manifests = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("one", "two")]
    assert manifests[0] == manifests[1]
    assert manifests[0]["complete"]


def test_twenty_kills_lose_and_double_nothing(tmp_path, plan):
    """Two processes at a time, one or both killed at a random moment of their work."""
    draws, out = random.Random(0), tmp_path / "killed"
    assert codes(start(plan, tmp_path / "whole")) == [0]
    whole = contents(tmp_path / "whole")
    for _ in range(20):
        if (out / "00004").exists():  # so that there is always something to do
            for place in ("00002", "00004"):
                run_rm(out / place)
        both = [start(plan, out), start(plan, out)]
        time.sleep(draws.uniform(0.05, 1.5))
        for process in both[: draws.choice([1, 2])]:
            os.kill(process.pid, signal.SIGKILL)
        codes(*both)
        there = contents(out) if out.exists() else {}
        assert all(whole[name] == data for name, data in there.items())
        blocks = {name.partition("/")[0] for name in there}
        assert len(there) == 6 * len(blocks)
    assert codes(start(plan, out)) == [0]
    assert contents(out) == whole
    assert not any(list((out / "state" / kind).iterdir()) for kind in ("parts", "locks"))
    assert run("status", out).exit_code == 0


def run_rm(place):
    """Removes a block, as somebody who wants it drawn again does."""
    if place.exists():
        for file in place.iterdir():
            file.unlink()
        place.rmdir()


def test_a_full_disk_ends_in_one_line_and_leaves_no_half(tmp_path, plan, capfd):
    """A limit on the size of files stands for the disk's: writing fails in the middle of one."""
    out = tmp_path / "o"
    start(plan, out, "--shard", "1/10").join()
    kept = contents(out)
    assert len(kept) == 6
    image = next(data for name, data in kept.items() if name.endswith(".png"))
    (code,) = codes(start(plan, out, limit=len(image) // 2))
    assert code == 2
    assert "free some space" in capfd.readouterr().err
    assert contents(out) == kept
    assert not list((out / "state/parts").iterdir())
    assert not list((out / "state/failures").iterdir())
    assert codes(start(plan, out)) == [0]
    assert len(contents(out)) == 60


def test_ranks_of_torchrun_share_a_plan(model, tmp_path):
    """Also where a block fails: a rank that ended with an error would end the other."""
    bad = {"segments": [{"phrase": "green dog", "box": [0, 0, 1, 1]}]}
    plan = write_plan(tmp_path / "p.json", model, count=8, plugin={"zest": {}}, block=1)
    values = json.loads(plan.read_text()) | {"sample": {"model": str(model), "steps": 2}}
    good = {"prompt": "a red circle", "segments": [{"phrase": "red circle", "box": [0, 0, 1, 1]}]}
    plan.write_text(json.dumps(values | {"conditions": [good, good, {"prompt": "a cat"} | bad]}))
    words = ["--nproc-per-node", "2", "-m", "guidekit", "sample", "--plan", plan]
    command = [sys.executable, "-m", "torch.distributed.run", *words, "--out", tmp_path / "o"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "failed   " in done.stderr
    told = json.loads(run("status", tmp_path / "o", "--json").stdout)
    assert [row["block"] for row in told["failures"]] == [2, 5]
    assert told["images"] == 6
