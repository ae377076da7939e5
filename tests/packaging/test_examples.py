"""Every example runs at tiny size, from another folder, as a user would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

import semantica_tiny
import tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.sd_pipeline().save_pretrained(folder)
    semantica_tiny.encoder().save_pretrained(folder / "encoder")
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, model, tmp_path):
    command = [sys.executable, str(example), str(model), "4"]
    if example.stem == "train_semantica":
        command.append(str(model / "encoder"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("a data set of 6" if example.stem == "train_semantica" else "energy") in done.stdout
