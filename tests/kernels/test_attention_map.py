"""The attention kernels: interpreter and compiler runs in their own processes, and plain errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
triton = pytest.importorskip("triton")


@pytest.mark.parametrize("file", ["interpreted_attention_map.py", "interpreted_models.py"])
def test_in_the_interpreter(file):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
