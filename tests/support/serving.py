"""A server on a free port of this machine, and a client of its API that knows nothing else."""

import base64
import contextlib
import http.client
import io
import json
import threading
import time

import numpy as np
import uvicorn
from PIL import Image

from guidekit.serve.app import make_app
from guidekit.serve.options import ServeOptions
from guidekit.serve.running import bound

PROMPT = "a red circle and a blue square on white"


@contextlib.contextmanager
def serving(options: ServeOptions, port: int = 0):
    """The port of a server that runs meanwhile."""
    listening = bound("127.0.0.1", port)
    config = uvicorn.Config(make_app(options), log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


class Client:
    """Speaks to a server as any program would."""

    def __init__(self, port, headers=None):
        self.port, self.headers = port, dict(headers or {})

    def ask(self, method, path, body=None, headers=None):
        """Status and what the answer holds; a body that is no bytes is sent as JSON."""
        status, _, data = self.raw(method, path, body, headers)
        return status, json.loads(data)

    def raw(self, method, path, body=None, headers=None):
        """Status, headers and bytes of an answer."""
        headers = self.headers | (headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"content-type": "application/json"} | headers
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def get(self, path):
        status, found = self.ask("GET", path)
        assert status == 200, found
        return found

    def draw(self, body):
        """The id of a new run."""
        status, found = self.ask("POST", "/api/runs", body)
        assert status == 201, found
        return found["id"]

    def events(self, id, after=0):
        """The events of a run until its stream ends: (number, kind, data)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", f"/api/runs/{id}/events", headers={"last-event-id": str(after)})
        answer = connection.getresponse()
        found = {}
        try:
            while line := answer.readline():
                key, _, value = line.decode().rstrip("\n").partition(": ")
                if key:
                    found[key] = value
                elif "data" in found:
                    yield int(found["id"]), found["event"], json.loads(found["data"])
                    found = {}
        finally:
            connection.close()

    def finished(self, id):
        """The run once it has ended."""
        for _ in self.events(id):
            pass
        return self.get(f"/api/runs/{id}")

    def image(self, id, path):
        """An image of a run."""
        status, _, data = self.raw("GET", f"/api/runs/{id}/files/{path}")
        assert status == 200
        return Image.open(io.BytesIO(data))


def png(array):
    """An array as a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def text(table):
    """A table as JSON in base64."""
    return base64.b64encode(json.dumps(table).encode()).decode()


def refused(client, body, *words, status=400, path="/api/runs", headers=None, method="POST"):
    """Checks that a request is refused in one line with these words."""
    found, answer = client.ask(method, path, body, headers)
    assert found == status, answer
    assert "\n" not in answer["error"]
    for word in words:
        assert word in answer["error"], answer["error"][:300]


def painted(size=48):
    """A map of two layers: a disc of 1 and a corner of 2, and their masks by definition."""
    y, x = np.mgrid[:size, :size]
    disc, corner = (x - 12) ** 2 + (y - 14) ** 2 <= 81, (x >= 30) & (y >= 31)
    return disc.astype("uint8") + 2 * corner.astype("uint8"), disc, corner


def with_layout(body, **plugin):
    """The run with the painted layout."""
    numbers, *_ = painted()
    layout = {
        "prompt": PROMPT,
        "map": "map.png",
        "segments": [
            {"phrase": "red circle", "value": 1},
            {"phrase": "blue square", "value": 2, "strength": 0.5},
        ],
    }
    files = {"layout.json": text(layout), "map.png": png(numbers)}
    sample = body["sample"] | {"prompt": PROMPT, "layout": "layout.json"}
    return body | {"sample": sample, "files": files, "plugin": plugin}
