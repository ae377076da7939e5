"""A library that cannot be imported is named with the versions that have to fit; it is no bug."""

import os
import subprocess
import sys

import pytest

from guidekit.cli.libraries import broken_import

NOT_FITTING = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


@pytest.mark.parametrize("words", [["doctor"], ["plugins", "show", "zest"]])
def test_torchvision_that_does_not_fit_is_told_in_a_line(tmp_path, words):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(NOT_FITTING)
    done = subprocess.run(
        [sys.executable, "-m", "guidekit", *words],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "torchvision cannot be imported (RuntimeError: operator torchvision::nms" in done.stderr
    assert "reinstall torch and torchvision together" in done.stderr
    assert "bug" not in done.stderr


def test_a_library_that_is_not_there_is_named():
    error = ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
    assert broken_import(error).startswith("diffusers cannot be imported")


def test_an_error_inside_of_a_call_is_none_of_an_import():
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert broken_import(caught.value) is None


def test_an_error_of_our_own_module_is_ours(tmp_path, monkeypatch):
    (tmp_path / "ours_with_a_bug.py").write_text("import torch\ntorch.zeros(2) @ torch.zeros(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError) as caught:
        __import__("ours_with_a_bug")
    assert broken_import(caught.value) is None
