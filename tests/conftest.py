"""Shared set-up: one torch thread, no downloads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402  (the variable must be set before any hub library is imported)

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The directory of a tiny Stable Diffusion pipeline."""
    import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.sd_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The directory of Semantica's tiny picture encoder."""
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
