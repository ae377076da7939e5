"""A hub id: what was downloaded is looked through as a folder is."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from guidekit.zoo.shipped import ZOO

LOADS = """
from guidekit.backbones.loading import load
print(type(load("someone/fine", "cpu")).__name__)
try:
    load("someone/evil", "cpu")
except ValueError as error:
    print(error)
"""


def _cached(home, name, **unet):
    """A pipeline as the hub's cache keeps it, with these keys in the config of its UNet."""
    folder = home / "hub" / f"models--someone--{name}"
    shutil.copytree(ZOO / "scenes-ddpm", folder / "snapshots/0")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0")
    config = folder / "snapshots/0/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | unet))


@pytest.mark.full
def test_downloaded_files_that_ask_for_code(tmp_path):
    _cached(tmp_path, "fine")
    _cached(tmp_path, "evil", auto_map={"AutoModel": "evil.X"})
    own = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", LOADS], capture_output=True, text=True, env=own, check=True
    )
    first, second = found.stdout.splitlines()
    assert first == "DDPMPipeline"
    assert "asks for Python of its own folder" in second
