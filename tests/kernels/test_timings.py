"""The table of times, the kernels' own check, and the choices that are made by them."""

import math
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from guidekit.attention import choice as implementations
from guidekit_kernels import ptxas, timings

ROW = dict(capability=[9, 0], h=8, n=1000, t=77, d=64, device="a GPU")


@pytest.fixture
def rows(monkeypatch):
    """An own table in place of the shipped one."""
    rows = [ROW | dict(us=dict(sdpa=3.0, kernel=1.0)), ROW | dict(n=100, us=dict(sdpa=1, kernel=3))]
    monkeypatch.setattr(timings, "table", lambda: rows)
    return rows


def test_the_shipped_table_holds_measurements_alone():
    for row in timings.table():
        assert set(row) >= {*ROW, "shape", "date", "torch", "triton"}
        assert {"sdpa", "kernel"} <= set(row["us"])
        assert all(math.isfinite(us) and us > 0 for us in row["us"].values())


def test_the_nearest_shape_decides(rows):
    assert timings.nearest((9, 0), 1500, 80, 40, 8) is rows[0]
    assert timings.nearest((9, 0), 64, 80, 40, 8) is rows[1]
    assert timings.nearest((8, 0), 900, 80, 64, 8) is None
    assert timings.measured((9, 0)) == "a GPU"
    assert timings.measured((8, 0)) is None


def test_automatic_choice_call_by_call(rows, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        key = torch.empty(1, 8, 77, 64, dtype=torch.bfloat16, device="cuda")
        query = {n: key.new_empty(1, 8, n, 64) for n in (100, 1000)}
        assert implementations.automatic(query[1000], key) == "triton"
        assert implementations.automatic(query[100], key) == "sdpa"
        assert implementations.automatic(query[1000].float(), key.float()) == "sdpa"


@pytest.mark.parametrize(
    "gpu, state, chosen",
    [
        ("a GPU", "available", "auto"),
        ("a GPU", "its check failed", "sdpa"),
        (None, "available", "sdpa"),
    ],
)
def test_automatic_needs_measured_times_and_a_passed_check(gpu, state, chosen, monkeypatch):
    monkeypatch.delenv("GUIDEKIT_ATTENTION", raising=False)
    monkeypatch.setattr(implementations, "_state", lambda name: state)
    monkeypatch.setattr(implementations, "measured_on", lambda: gpu)
    assert implementations.choose() == chosen


def own_kernels(folder, monkeypatch, check: str) -> None:
    """Kernels whose check is `check` and that have passed where the file `passed` is."""
    package = folder / "own_kernels"
    package.mkdir()
    (package / "check.py").write_text(check)
    record = f"from pathlib import Path\ndef passed(): return Path({str(folder)!r}) / 'passed'"
    (package / "record.py").write_text(record)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    for name in ("own_kernels", "own_kernels.record"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(implementations, "KERNELS", "own_kernels")
    monkeypatch.setattr(implementations, "CHECKING", 1 if "sleep" in check else 60)


@pytest.mark.parametrize(
    "check, state",
    [
        ("print('right')", "available"),
        ("raise SystemExit(print('77 keys are off') or 1)", "its .* failed \\(77 keys are off\\)"),
        ("import os; os.abort()", "its check on this GPU failed \\(exit code -6\\)"),
        ("import time; time.sleep(60)", "its check on this GPU did not end in 1 seconds"),
    ],
)
def test_kernels_that_fail_their_check_are_not_available(check, state, tmp_path, monkeypatch):
    own_kernels(tmp_path, monkeypatch, check)
    assert re.fullmatch(state, implementations._checked())


def test_a_pass_is_remembered(tmp_path, monkeypatch):
    own_kernels(tmp_path, monkeypatch, "raise SystemExit(1)")
    (tmp_path / "passed").write_text("right\n")
    assert implementations._checked() == "available"


@pytest.mark.parametrize(
    "version, capability, refused",
    [
        ("12.8", (9, 0), True),
        ("12.9", (9, 0), False),
        ("13.4", (9, 0), False),
        ("12.8", (8, 0), False),
        ("12.8", (10, 0), False),
    ],
)
def test_an_assembler_that_makes_wrong_code_is_refused(version, capability, refused, monkeypatch):
    monkeypatch.setattr(ptxas, "version", lambda capability: version)
    text = ptxas.fault(capability)
    assert bool(text) == refused
    if refused:
        assert "ptxas 12.8" in text
        assert "TRITON_PTXAS_PATH" in text
        assert "triton 3.8" in text


def test_the_version_of_the_assembler_at_hand():
    pytest.importorskip("triton")
    assert re.fullmatch(r"\d+\.\d+", ptxas.version((9, 0)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_the_check_fails_without_a_gpu():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "guidekit_kernels.check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == "no CUDA device\n"
