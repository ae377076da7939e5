"""What holds for every hostile input: no code of it runs, nothing is fetched, nothing leaves."""

import socket
import sys
from pathlib import Path

import pytest

import corpus


@pytest.fixture
def inbox(tmp_path, monkeypatch):
    """A folder for hostile files; what they must not do is looked for when the test has ended."""
    folder = tmp_path / "a" / "b" / "inbox"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    tried = []

    def connect(self, address):
        tried.append(address)
        raise OSError("no connections in tests")

    # Not offline, so that what would be fetched is seen as an attempt.
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as python -m guidekit has it
    yield folder
    assert not tried, "a hostile file made something be fetched"
    assert not list(tmp_path.rglob(corpus.RAN)), "code of a hostile file ran"
    outside = [p for p in tmp_path.rglob("*") if folder not in p.parents and p != folder]
    assert {Path(p) for p in outside} <= set(folder.parents), "something was written outside"
