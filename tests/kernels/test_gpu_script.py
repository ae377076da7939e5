"""`benchmarks/gpu.sh` at tiny sizes on this machine: every part leaves its rows, and is resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
STEPS = {"CFG", "Zest", "pww", "pag"}
METHODS = {"SDPA, no maps", "eager", "second softmax", "augmented V"}


def run(folder: Path, *parts: str, **variables: str) -> subprocess.CompletedProcess:
    variables = {"OUT": str(folder), "PYTHON": sys.executable, "TINY": "1"} | variables
    environment = os.environ | {"BACKEND": "eager", "BUDGET": "900"} | variables
    return subprocess.run([SCRIPT, *parts], env=environment, capture_output=True, text=True)


def rows(folder: Path, part: str) -> list[dict]:
    facts = json.loads((folder / f"{part}.json").read_text())
    assert facts["finished"]
    assert facts["torch"]
    assert facts["date"]
    return facts["rows"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the quick parts have left their results."""
    folder = tmp_path_factory.mktemp("gpu")
    done = run(folder, "check", "attention", "sd15", "sdxl")
    assert done.stdout.count("finished") == 4, (
        done.stdout + (folder / "log.txt").read_text()[-3000:]
    )
    return folder


@pytest.mark.timeout(1200)
def test_the_check_says_what_it_found(folder):
    (row,) = rows(folder, "check")
    assert (row["exit"], row["last lines"]) in ((0, ["right"]), (1, ["no CUDA device"]))


@pytest.mark.timeout(1200)
def test_every_method_at_every_shape(folder):
    found = rows(folder, "attention")
    shapes = {row["shape"] for row in found if "shape" in row}
    assert {"SD 1.5, 64x64", "SDXL, 32x32", "PixArt, 64x64", "SD 3 medium", "Flux"} <= shapes
    measured = {(r["shape"], r["method"]) for r in found if r.get("both ms", 0) > 0}
    assert sum("Q and K rounded" in row for row in found) == 6
    assert measured >= {(shape, method) for shape in shapes for method in METHODS}
    assert all(r["map error"] < 1e-4 for r in found if r.get("map error"))
    assert {(r["backend"], r["queries padded"]) for r in found if "backend" in r} >= {
        ("FLASH_ATTENTION", True),
        ("CUDNN_ATTENTION", False),
    }


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", ["sd15", "sdxl"])
def test_every_guided_step(folder, part):
    found = rows(folder, part)
    assert {(r["step"], r["batch"]) for r in found if r["finite"] and r["ms"] > 0} == {
        (step, batch) for step in STEPS | {"plain Zest"} for batch in (1, 4)
    }


@pytest.mark.timeout(1200)
def test_what_is_finished_is_not_done_again(folder):
    before = (folder / "sd15.json").read_text()
    assert run(folder, "sd15", "check").stdout == "sd15: finished before\ncheck: finished before\n"
    assert (folder / "sd15.json").read_text() == before


def test_a_part_without_time_or_of_no_name(tmp_path):
    done = run(tmp_path, "sd15", BUDGET="0")
    assert done.stdout == "sd15: no time left; start again for it\n"
    done = run(tmp_path, "sd16")
    assert done.returncode == 2
    assert "no part 'sd16'" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("part", ["compiled-sd15", "compiled-sdxl"])
def test_compiled_steps(part, tmp_path):
    run(tmp_path, part)
    found = rows(tmp_path, part)
    assert {r["step"] for r in found if r["finite"] and r["compiled"] == "eager"} == STEPS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tests_that_need_a_gpu(tmp_path):
    run(tmp_path, "tests")
    (row,) = rows(tmp_path, "tests")
    assert row["exit"] == 0
    assert "skipped" in row["last lines"][-1]
