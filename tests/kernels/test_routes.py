"""The table of times and the choices that are made by it."""

import math
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from guidekit.attention import choice as implementations
from guidekit_kernels import reference, routes, tiles

ROW = dict(arch=90, joint=False, h=8, n=1000, t=77, d=64, source="model", device="a GPU")


@pytest.fixture
def rows(monkeypatch):
    """An own table in place of the shipped one."""
    rows = [
        ROW | dict(us=dict(sdpa=3.0, fused=1.0)),
        ROW | dict(n=100, us=dict(sdpa=1.0, fused=3.0)),
        ROW | dict(joint=True, t=1000, us=dict(sdpa=9.0, fused=3.0, vendor=2.0)),
        ROW | dict(joint=True, t=100, n=100, us=dict(sdpa=9.0, fused=2.0, vendor=3.0)),
    ]
    monkeypatch.setattr(routes, "table", lambda: rows)
    return rows


def test_the_shipped_table():
    for row in routes.table():
        assert set(row) >= {*ROW, "shape", "date", "us"} and row["source"] in ("measured", "model")
        assert {"sdpa", "fused"} <= set(row["us"]) <= {"sdpa", "fused", "vendor"}
        assert all(math.isfinite(us) and us > 0 for us in row["us"].values())
        assert row["arch"] in tiles._TABLE
    assert any(row["joint"] for row in routes.table())


def test_the_nearest_shape_decides(rows):
    assert routes.nearest(90, False, 1500, 80, 40, 8) is rows[0]
    assert routes.nearest(90, False, 64, 80, 40, 8) is rows[1]
    assert routes.nearest(90, True, 900, 900, 64, 8) is rows[2]
    assert routes.nearest(80, True, 900, 900, 64, 8) is None
    assert routes.measured(90) is None
    rows[0]["source"] = "measured"
    assert routes.measured(90) == "a GPU" and routes.measured(80) is None


def test_joint_attention_takes_the_faster_route(rows):
    large, small = (torch.zeros(1, 8, n, 64) for n in (900, 90))
    columns = torch.tensor([3])
    leaf = {n: x.clone().requires_grad_() for n, x in (("large", large), ("small", small))}
    assert routes.route(large, leaf["large"], large, columns=columns) == "vendor"
    assert routes.route(small, leaf["small"], small, columns=columns) == "fused"
    assert routes.route(large, large, large, columns=columns) == "fused"  # dQ alone
    assert routes.route(large, leaf["large"], large) == "fused"
    many = torch.arange(65)
    assert routes.route(large, leaf["large"], large, columns=many) == "fused"
    assert routes.route(large, leaf["large"], large, torch.zeros(1), columns) == "fused"
    with torch.no_grad():
        assert routes.route(large, leaf["large"], large, columns=columns) == "fused"


def test_the_vendors_route_gives_the_same(rows):
    q, k, v = (torch.randn(1, 8, 900, 16, requires_grad=True) for _ in range(3))
    weights = torch.zeros(1, 900, 1)
    weights[:, 3] = 1
    given = routes.attend(q, k, v, weights, rows=slice(5, None), columns=torch.tensor([3]))
    torch.testing.assert_close(given, reference.attention_map(q, k, v, weights, rows=slice(5, 900)))


def test_automatic_choice_call_by_call(rows, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    with FakeTensorMode():
        key = torch.empty(1, 8, 77, 64, dtype=torch.bfloat16, device="cuda")
        query = {n: key.new_empty(1, 8, n, 64) for n in (100, 1000)}
        assert implementations.automatic(query[1000], key) == "triton"
        assert implementations.automatic(query[100], key) == "sdpa"
        assert implementations.automatic(query[1000].float(), key.float()) == "sdpa"


@pytest.mark.parametrize("gpu, chosen", [("an H200", "auto"), (None, "sdpa")])
def test_automatic_needs_times_measured_on_such_a_gpu(gpu, chosen, monkeypatch):
    monkeypatch.delenv("GUIDEKIT_ATTENTION", raising=False)
    monkeypatch.setattr(implementations, "_state", lambda name: "available")
    monkeypatch.setattr(implementations, "_triton_lacks", lambda device: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(implementations, "measured_on", lambda: gpu)
    assert implementations.choose() == chosen
    assert implementations.choose("triton") == "triton"


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
    (tmp_path / "own_kernels").mkdir()
    (tmp_path / "own_kernels" / "check.py").write_text(check)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(implementations, "KERNELS", "own_kernels")
    monkeypatch.setattr(implementations, "CHECKING", 1 if "sleep" in check else 60)
    assert re.fullmatch(state, implementations._checked())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_the_check_fails_without_a_gpu():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "guidekit_kernels.check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "complaint" in run.stderr and "No module" not in run.stderr
