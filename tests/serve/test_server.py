"""A server as a whole: load, what is let go, a stranger's plugin, and the command that serves."""

import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import time

from serving import Client, serving, with_layout


def test_nothing_is_lost_under_load(options, body, tmp_path):
    """Fifty runs, of which some clients listen and vanish, and one server."""
    own = dataclasses.replace(options, out=tmp_path, preview=0)
    one = body | {"sample": body["sample"] | {"steps": 1}}
    with serving(own) as port:
        client = Client(port)
        ids = [client.draw(one | {"sample": one["sample"] | {"seeds": [i]}}) for i in range(50)]
        for id in ids[::5]:  # listens to the first event and hangs up
            with socket.create_connection(("127.0.0.1", port)) as gone:
                gone.sendall(
                    f"GET /api/runs/{id}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
                )
                gone.recv(64)
        waits = [run["position"] for run in client.get("/api/runs")["runs"] if run["position"]]
        assert waits == list(range(1, len(waits) + 1))
        runs = [client.finished(id) for id in ids]
        assert [run["state"] for run in runs] == ["finished"] * 50
        assert [sorted(p.name for p in (tmp_path).glob(f"{id}-*/*.png")) for id in ids] == [
            [f"{i}.png"] for i in range(50)
        ]
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and len(client.get("/api/runs")["runs"]) != 50:
            time.sleep(0.05)
        assert len(client.get("/api/runs")["runs"]) == 50


def test_what_is_over_is_let_go(options, body, tmp_path):
    limits = dataclasses.replace(options.limits, queue=2, kept=2)
    own = dataclasses.replace(options, out=tmp_path, limits=limits)
    with serving(own) as port:
        client = Client(port)
        ids = []
        for _ in range(4):
            ids.append(client.draw(body))
            client.finished(ids[-1])
        assert [run["id"] for run in client.get("/api/runs")["runs"]] == ids[-2:]
        assert len(list(tmp_path.glob("*/run.json"))) == 4


def test_requests_of_old_runs_do_not_fill_the_memory(options, body, tmp_path):
    run = with_layout(body) | {"record": {"junk": "x" * 10_000, "calls": {}}}
    with serving(dataclasses.replace(options, out=tmp_path / "first")) as port:
        client = Client(port)
        kept = client.finished(client.draw(run))["body"]
    assert kept["record"] == {"calls": {}}
    limits = dataclasses.replace(options.limits, held=2 * len(json.dumps(kept)))
    with serving(dataclasses.replace(options, out=tmp_path, limits=limits)) as port:
        client = Client(port)
        ids = []
        for _ in range(4):
            ids.append(client.draw(run))
            client.finished(ids[-1])
        assert [run["id"] for run in client.get("/api/runs")["runs"]] == ids[-2:]


FOG = '''
"""Fog: a stranger's plugin."""

from dataclasses import dataclass

import guidekit


@dataclass(kw_only=True)
class Fog(guidekit.Guidance):
    """Thickens the fog."""

    depth: float = 0.3  # of the fog, in metres

    def energy(self, step):
        return self.depth * step.x0.square().flatten(1).mean(1)


@guidekit.hookimpl
def register_guidance(register):
    register("fog", Fog)
'''


def test_a_strangers_plugin_has_knobs_and_draws(options, body, tmp_path, monkeypatch):
    (tmp_path / "guidekit_fog.py").write_text(FOG)
    info = tmp_path / "fog-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fog\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[guidekit]\nfog = guidekit_fog\n")
    monkeypatch.syspath_prepend(tmp_path)
    with serving(dataclasses.replace(options, plugins=("fog",), out=tmp_path / "o")) as port:
        client = Client(port)
        (found,) = client.get("/api")["plugins"]
        assert found["name"] == "fog"
        assert found["summary"] == "Fog: a stranger's plugin."
        knobs = {knob["option"]: knob for knob in found["knobs"]}
        assert knobs["depth"]["comment"] == "of the fog, in metres"
        run = client.finished(client.draw(body | {"plugin": {"fog": {"depth": 2.0}}}))
        assert run["records"][""]["record"]["energy"]["fog"][0] > 0


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    words = ["serve", "--port", "0", "--plugin", "pag", "--model", "scenes-ddpm", "--out", "o"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "guidekit", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = next(line for line in process.stdout if line.startswith("open"))
        client = Client(int(re.search(r":(\d+)/", line)[1]))
        assert client.get("/api")["models"] == ["scenes-ddpm"]
        id = client.draw({"sample": {"steps": 200, "seeds": [0]}})
        events = client.events(id)
        next(data for _, kind, data in events if kind == "step")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    (record,) = (tmp_path / "o").glob(f"{id}-*/run.json")
    assert json.loads(record.read_text())["record"]["status"] == "stopped"
