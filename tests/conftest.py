"""Shared set-up: one torch thread, no downloads, the same numbers each time; what is `full`."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as background jobs of scripts have it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Folders and modules that leave the tier `fast` whole. Single tests carry `pytest.mark.full`.
FULL = (
    "backbones/test_families.py",
    "cli/test_scale_processes.py",
    "core/test_offload.py",
    "kernels",
    "noisy_clip",
    "packaging/test_examples.py",
    "packaging/test_wheels.py",
    "plugins/test_perturbed_backbones.py",
    "semantica/test_semantica_processes.py",
    "semantica/test_semantica_train.py",
    "semantica/test_semantica_weights.py",
    "serve",
    "testing",
    "train",
    "worlds/test_objects_train.py",
)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what lies in the folders and modules of `FULL`."""
    here = Path(__file__).parent
    for item in items:
        if any(item.path.is_relative_to(here / entry) for entry in FULL):
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The directory of a tiny Stable Diffusion pipeline."""
    import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.sd_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The directory of Semantica's tiny image encoder."""
    import semantica_tiny

    folder = tmp_path_factory.mktemp("encoder")
    semantica_tiny.encoder().save_pretrained(folder)
    return folder


@pytest.fixture
def small_uvit(monkeypatch):
    """A tiny model under the name of the variant `tiny`."""
    import semantica_tiny
    from guidekit.semantica.model import VARIANTS

    monkeypatch.setitem(VARIANTS, "tiny", semantica_tiny.UVIT)
