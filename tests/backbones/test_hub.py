"""The hub out of reach: one line within seconds, whatever keeps it away."""

import http.server
import socket
import threading
import time

import pytest
from huggingface_hub import constants

from guidekit import load
from guidekit.backbones.hub import require_hub
from guidekit.errors import GuidekitError


@pytest.fixture
def online(monkeypatch):
    """`online(address)`: the hub is there, and not kept away."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)


def test_a_model_that_is_nowhere_and_a_hub_that_is_kept_away():
    with pytest.raises(
        GuidekitError, match="'nobody/x' cannot be loaded: .*HF_HUB_OFFLINE"
    ) as caught:
        load("nobody/x")
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer(online):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        online(f"http://127.0.0.1:{free.getsockname()[1]}")
    started = time.monotonic()
    with pytest.raises(GuidekitError, match="does not answer .*; check the network, or run hf"):
        require_hub("nobody/x", "model_index.json")
    assert time.monotonic() - started < 20


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one model."""

    def do_GET(self):
        """Answers for `somebody/x` alone."""
        self.send_response(200 if self.path == "/api/models/somebody/x" else 404)
        self.end_headers()

    def log_message(self, *_):
        """Says nothing."""


def test_a_model_that_the_hub_does_not_have(online):
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online(f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(GuidekitError, match="has no 'nobody/x' that this account may read"):
            require_hub("nobody/x", "model_index.json")
        require_hub("somebody/x", "model_index.json")
    finally:
        server.shutdown()


def test_what_is_in_the_cache_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--somebody--x"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "snapshots/abc/model_index.json").write_text("{}")
    require_hub("somebody/x", "model_index.json")
    with pytest.raises(GuidekitError, match="not in the hub's cache"):
        require_hub("somebody/x", "other.json")
