"""A slice of benchmarks/conformance.py: cells, footnotes, its exit code."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from guidekit import Guidance

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield loaded()


def loaded():
    spec = importlib.util.spec_from_file_location("matrix", BENCHMARKS / "conformance.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_slice(script, tmp_path):
    path = tmp_path / "cells.json"
    args = ["--quick", "--family", "DiT", "--plugin", "pag", "--plugin", "zest", "--json", path]
    result = CliRunner().invoke(script.main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    assert "| pag | ok | ok |" in result.output
    assert "| zest | [1] | [1] |" in result.output
    assert "[1] refused: zest needs a prompt that pixels attend to" in result.output
    assert "2 ok, 2 refused, 0 failed" in result.output
    cells = json.loads(path.read_text())["rows"]
    assert {c["scheduler"] for c in cells} == {"ddim", "unipc"}


def test_a_run_that_was_cut_short_goes_on(script, tmp_path, monkeypatch):
    path = tmp_path / "cells.json"
    args = [
        "--quick",
        "--family",
        "DiT",
        "--plugin",
        "zest",
        "--plugin",
        "apg",
        "--json",
        str(path),
    ]
    CliRunner().invoke(script.main, args)
    whole = json.loads(path.read_text())
    assert [row["state"] for row in whole["rows"]] == ["ok", "refused"] * 2
    assert whole["finished"]
    short = whole | {"finished": False, "rows": whole["rows"][:2]}
    path.write_text(json.dumps(short))
    asked = []
    cell = script.cell
    monkeypatch.setattr(script, "cell", lambda *given: asked.append(given[2:4]) or cell(*given))
    CliRunner().invoke(script.main, args)
    assert asked == [("unipc", "apg"), ("unipc", "zest")]
    assert json.loads(path.read_text())["rows"] == whole["rows"]


class Nothing(Guidance):
    """Does nothing."""


class Broken(Guidance):
    """Has a fault."""

    def prepare(self, run):
        raise TypeError("a fault")


@pytest.mark.parametrize("cls, says", [(Nothing, "has no act"), (Broken, "TypeError: a fault")])
def test_what_neither_acts_nor_refuses_fails(script, monkeypatch, cls, says):
    monkeypatch.setattr(script, "guidances", lambda: {"odd": cls})
    result = CliRunner().invoke(script.main, ["--quick", "--family", "DiT"])
    assert result.exit_code == 1
    assert says in result.output
