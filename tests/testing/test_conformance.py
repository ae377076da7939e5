"""A slice of benchmarks/conformance.py: cells, footnotes, its exit code."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from guidekit import Guidance


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "benchmarks" / "conformance.py"
    spec = importlib.util.spec_from_file_location("conformance_matrix", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_slice(script, tmp_path):
    path = tmp_path / "cells.json"
    args = ["--quick", "--family", "DiT", "--plugin", "pag", "--plugin", "zest", "--json", path]
    result = CliRunner().invoke(script.main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    assert "| pag | ok | ok |" in result.output and "| zest | [1] | [1] |" in result.output
    assert "[1] refused: zest needs a prompt that pixels attend to" in result.output
    assert "2 ok, 2 refused, 0 failed" in result.output
    cells = json.loads(path.read_text())
    assert {c["scheduler"] for c in cells} == {"ddim", "unipc"}


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
    assert result.exit_code == 1 and says in result.output
