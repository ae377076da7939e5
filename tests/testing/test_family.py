"""A slice of benchmarks/family.py: methods beside the measurement put back and unguided images."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_slice(tmp_path):
    path = tmp_path / "rows.json"
    args = ["--quick", "--model", "digits-ddpm", "--task", "inpainting"]
    for method in ("A^+ y", "unguided", "ddnm"):
        args += ["--method", method]
    command = [sys.executable, ROOT / "benchmarks" / "family.py", *args, "--json", path]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(path.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["A^+ y", "unguided", "ddnm"]
    assert not found["finished"]  # a slice is not all of it
    assert rows["ddnm"]["measured"] < 1e-3 < rows["unguided"]["measured"]
    assert rows["ddnm"]["PSNR"] > rows["unguided"]["PSNR"]
