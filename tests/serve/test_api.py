"""The API: a run is posted, followed, read and stopped; what arrives is what was sent."""

import base64
import dataclasses
import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from guidekit import Guidance
from guidekit.__main__ import main
from guidekit.cli.plan import make_plan
from guidekit.cli.session import Session, Stopped
from guidekit.cli.settings import make_settings, parse_config
from guidekit.serve.events import EventLog
from guidekit.serve.knobs import guidance_knobs
from guidekit.serve.models import Models
from guidekit.serve.watcher import Watcher
from serving import PROMPT, painted, png, refused, text, with_layout


def test_the_client_of_the_documentation_draws(port, body):
    docs = Path(__file__).parents[2] / "docs/reference/serve-api.md"
    (code,) = re.findall(r"```python\n(.*?)```", docs.read_text(), re.DOTALL)
    names = {}
    exec(compile(code, str(docs), "exec"), names)
    image = Image.open(io.BytesIO(names["draw"](f"http://127.0.0.1:{port}", body["sample"])))
    assert image.text["guidekit"]
    assert image.format == "PNG"


def test_what_a_server_offers_is_told(client, options):
    about = client.get("/api")
    assert about["version"] == 1
    assert about["models"] == list(options.models)
    assert {p["name"] for p in about["plugins"]} >= {"zest", "pag"}
    assert about["limits"]["steps"] == 50


def test_a_run_draws_what_the_command_line_draws(client, body, tmp_path):
    run = client.finished(client.draw(body))
    assert (run["state"], run["error"]) == ("finished", None)
    config = tmp_path / "run.json"
    config.write_text(json.dumps({k: body[k] for k in ("format", "sample")}))
    words = ["sample", "--config", str(config), "--out", str(tmp_path / "o"), "--quiet"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.stderr
    drawn = np.asarray(client.image(run["id"], "3.png"))
    assert np.array_equal(drawn, np.asarray(Image.open(tmp_path / "o/3.png")))


def test_a_painted_map_arrives_pixel_by_pixel(client, body):
    _, disc, corner = painted()
    run = client.finished(client.draw(with_layout(body)))
    (record,) = run["records"].values()
    for segment, mask in zip(record["segment"], (disc, corner), strict=True):
        arrived = np.asarray(client.image(run["id"], segment["mask"]))
        assert np.array_equal(arrived, mask * np.uint8(255))
    assert [s["strength"] for s in record["segment"]] == [1.0, 0.5]


def test_events_tell_steps_previews_energies_and_attention(client, body):
    run = with_layout(body, zest={"stop": 1.0})
    run["sample"]["compare"] = True
    events = list(client.events(client.draw(run)))
    assert [number for number, *_ in events] == sorted({number for number, *_ in events})
    states = [data["state"] for _, kind, data in events if kind == "state"]
    assert states == ["queued", "loading", "drawing", "finished"]
    steps = [data for _, kind, data in events if kind == "step"]
    assert [(s["guided"], s["step"], s["done"], s["total"]) for s in steps] == [
        (True, 0, 1, 4),
        (True, 1, 2, 4),
        (False, 0, 3, 4),
        (False, 1, 4, 4),
    ]
    rows = [row for step in steps for row in step["rows"]]
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["energy"] > 0 and row["update_ratio"] > 0 for row in rows)
    maps = [data for _, kind, data in events if kind == "maps"]
    assert maps
    assert len(maps[-1]["maps"][0]) == 2


def test_a_preview_shows_the_last_image(body, client):
    id = client.draw(body | {"sample": body["sample"] | {"steps": 30}})
    previews = [data for _, kind, data in client.events(id) if kind == "preview"]
    assert previews
    assert previews[0]["images"][0].startswith("data:image/webp;base64,")


def test_who_lost_the_connection_gets_the_rest(client, body):
    id = client.draw(body)
    events = list(client.events(id))
    numbers = [number for number, *_ in client.events(id, after=events[2][0])]
    assert numbers == [n for n, k, _ in events[3:] if k != "preview"]


def test_a_log_keeps_the_last_preview_alone():
    log = EventLog(100)
    for step in range(3):
        log.add("step", step=step)
        log.add("preview", step=step)
    assert [(e.kind, e.data["step"]) for e in log.since(0)] == [
        ("step", 0),
        ("step", 1),
        ("step", 2),
        ("preview", 2),
    ]
    assert [e.number for e in log.since(5)] == [6]


def test_of_too_many_steps_those_at_equal_distances_are_kept():
    log = EventLog(4)
    log.add("state", state="drawing")
    for step in range(9):
        log.add("step", step=step)
    found = [(e.kind, e.data.get("step")) for e in log.since(0)]
    assert found[0] == ("state", None)
    assert [step for _, step in found[1:]] == [0, 4, 8]


def test_a_model_that_is_there_does_not_wait_for_one_that_loads(monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def load(name, *_):
        if name == "slow":
            begun.set()
            go.wait(30)
        return object()

    monkeypatch.setattr("guidekit.serve.models.load_model", load)
    models = Models(None, None)
    there = models.load("quick")
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(models.load, "slow") for _ in range(2)]
        begun.wait(30)
        assert models.load("quick") is there
        go.set()
        assert slow[0].result() is slow[1].result()
    assert models.load("third") is models.load("third")
    assert models.load("quick") is not there  # of two that are kept it was used longest ago


def test_a_run_is_stopped_within_a_step(client, body):
    id = client.draw(body | {"sample": body["sample"] | {"steps": 50, "seeds": [0, 1, 2, 3]}})
    after, last = None, None
    for _, kind, data in client.events(id):
        if kind == "step":
            last = data["step"]
        if kind == "step" and after is None:
            after = data["step"]
            client.ask("DELETE", f"/api/runs/{id}")
    run = client.get(f"/api/runs/{id}")
    assert run["state"] == "stopped"
    assert last < 49
    assert run["records"][""]["record"]["status"] == "stopped"


def test_a_watcher_ends_a_run_with_the_step_at_which_it_is_told(body, tmp_path):
    sample = body["sample"] | {"steps": 9, "seeds": [0, 1]}
    log, stop = EventLog(100), threading.Event()
    watcher = Watcher(log, stop, every=0)

    def watch(sampling, step):
        if step.index == 3:
            stop.set()
        watcher(sampling, step)

    settings = make_settings(parse_config({"sample": sample}, tmp_path, "test"), {})
    session = Session(make_plan(dataclasses.replace(settings, out=tmp_path / "o")), watch)
    with pytest.raises(Stopped):
        session.draw()
    assert [event.data["step"] for event in log.since(0)] == [0, 1, 2, 3]


def test_a_run_that_waits_is_stopped_at_once(client, body):
    long = body | {"sample": body["sample"] | {"steps": 50}}
    first, second = client.draw(long), client.draw(long)
    _, stopped = client.ask("DELETE", f"/api/runs/{second}")
    assert stopped["state"] == "stopped"
    assert stopped["folder"] is None
    client.ask("DELETE", f"/api/runs/{first}")
    client.finished(first)


def test_what_cannot_work_is_told_and_the_next_run_is_drawn(client, body):
    wrong = with_layout(body)
    wrong["sample"]["prompt"] = "nothing of it"
    run = client.finished(client.draw(wrong))
    assert run["state"] == "failed"
    assert "does not occur in the prompt" in run["error"]
    assert client.finished(client.draw(body))["state"] == "finished"


def test_tokens_of_phrases_or_why_there_are_none(client, body):
    phrases = [{"phrase": "blue square"}, {"phrase": "cat"}, {"phrase": ""}]
    asked = {"prompt": PROMPT, "phrases": phrases}
    status, found = client.ask("POST", "/api/tokens", asked)
    assert status == 200
    starts = {t["column"]: PROMPT[t["start"] : t["end"]] for t in found["tokens"]}
    assert "".join(starts[c] for c in found["phrases"][0]["columns"]) == "bluesquare"
    assert "does not occur" in found["phrases"][1]["error"]
    assert "empty phrase" in found["phrases"][2]["error"]


def opened(client, **request):
    status, found = client.ask("POST", "/api/open", {"size": [48, 48]} | request)
    assert status == 200, found
    return found


def numbers_of(found):
    """The map of an answer."""
    return np.frombuffer(base64.b64decode(found["map"]), np.uint8).reshape(found["size"])


def test_an_image_restores_the_run_that_drew_it(client, body):
    id = client.draw(with_layout(body, zest={"stop": 0.7}))
    client.finished(id)
    *_, image = client.raw("GET", f"/api/runs/{id}/files/3.png")
    files = {"dropped.png": base64.b64encode(image).decode()}
    found = opened(client, files=files, main="dropped.png")
    assert (found["kind"], found["notes"]) == ("run", [])
    assert np.array_equal(numbers_of(found), painted()[0])
    assert found["sample"]["prompt"] == PROMPT
    assert found["sample"]["seeds"] == [3]
    assert found["plugin"]["zest"]["stop"] == 0.7
    again = {"sample": found["sample"], "plugin": found["plugin"]}
    again |= {"segment": found["segments"], "files": found["files"]}
    second = client.draw(again)
    client.finished(second)
    assert np.array_equal(client.image(id, "3.png"), client.image(second, "3.png"))


def test_the_request_of_a_run_restores_it(client, body):
    run = client.get(f"/api/runs/{client.draw(with_layout(body))}")
    found = opened(client, body=run["body"])
    assert np.array_equal(numbers_of(found), painted()[0])
    assert [s["phrase"] for s in found["segments"]] == ["red circle", "blue square"]


def test_an_image_restores_what_its_run_followed(client, body):
    red = png(np.full((16, 16, 3), (200, 30, 30), "uint8"))
    run = body | {"plugin": {"ilvr": {"image": "red.png"}}, "files": {"red.png": red}}
    id = client.draw(run)
    assert client.finished(id)["state"] == "finished"
    *_, image = client.raw("GET", f"/api/runs/{id}/files/3.png")
    files = {"dropped.png": base64.b64encode(image).decode()}
    found = opened(client, files=files, main="dropped.png")
    assert found["plugin"]["ilvr"]["image"] == "given/red.png"
    assert (found["files"], found["notes"]) == ({"given/red.png": red}, [])
    again = {key: found[key] for key in ("sample", "plugin", "files")}
    second = client.draw(again)
    client.finished(second)
    assert np.array_equal(client.image(id, "3.png"), client.image(second, "3.png"))
    table = client.get(f"/api/runs/{id}")["records"][""]
    alone = opened(client, files={"run.json": text(table)}, main="run.json")
    assert alone["notes"] == ["ilvr.image: the image red.png is not here; add it again"]
    both = opened(client, files={"run.json": text(table), "red.png": red}, main="run.json")
    assert both["plugin"]["ilvr"]["image"] == "red.png"


def test_values_that_stand_anyway_are_not_restored(client, body):
    client.finished(id := client.draw(body))
    table = client.get(f"/api/runs/{id}")["records"][""]
    found = opened(client, files={"run.json": text(table)}, main="run.json")
    assert not {"memory", "nonfinite", "tries", "particles"} & set(found["sample"])
    assert found["sample"]["compare"] is False
    assert found["sample"]["model"] == body["sample"]["model"]
    table["sample"]["model"] = "objects"  # what stands where no model is named
    found = opened(client, files={"run.json": text(table)}, main="run.json")
    assert found["notes"] == ["this server has no model 'objects'"]


def test_masks_and_layouts_are_opened(client):
    _, disc, _ = painted()
    found = opened(client, files={"m.png": png(disc * np.uint8(255))}, main="m.png")
    assert found["kind"] == "mask"
    assert np.array_equal(numbers_of(found), disc)
    layout = {"prompt": "a dog", "segments": [{"phrase": "dog", "box": [0, 0, 0.5, 1]}]}
    found = opened(client, files={"l.json": text(layout)}, main="l.json")
    assert found["segments"] == [{"phrase": "dog", "box": [0, 0, 0.5, 1]}]
    assert np.array_equal(numbers_of(found), np.repeat([[1] * 24 + [0] * 24], 48, 0))


def test_a_run_json_without_its_masks_says_so(client):
    table = {"sample": {"prompt": "a dog"}, "segment": [{"phrase": "dog", "mask": "masks/0.png"}]}
    found = opened(client, files={"run.json": text(table)}, main="run.json")
    assert found["segments"] == []
    assert "masks/0.png is not here" in found["notes"][0]
    files = {"run.json": text(table), "0.png": png(np.full((48, 48), 255, "uint8"))}
    found = opened(client, files=files, main="run.json")
    assert found["notes"] == []
    assert numbers_of(found).min() == 1


def test_a_grid_is_a_sheet_of_runs(client, body):
    run = body | {"grid": ["steps=1,2", "cfg=1,3"]}
    found = client.finished(client.draw(run))
    assert found["state"] == "finished", found["error"]
    records = found["records"]
    assert sorted(records) == ["0-0", "0-1", "1-0", "1-1"]
    asked = [(records[c]["sample"]["steps"], records[c]["sample"]["cfg"]) for c in sorted(records)]
    assert asked == [(1, 1.0), (1, 3.0), (2, 1.0), (2, 3.0)]
    assert "sheet.png" in found["files"]
    assert opened(client, body=found["body"])["grid"] == [["steps", "1, 2"], ["cfg", "1, 3"]]


def test_knobs_come_from_the_fields_of_any_plugin():
    from typing import Literal

    @dataclasses.dataclass(kw_only=True)
    class Fog(Guidance):
        """Thickens the fog.

        More words.
        """

        scale: float = 2.0
        kind: Literal["thin", "thick"] = "thin"  # of fog
        count: int = 3  # layers of it
        names: tuple[str, ...] = ("a",)
        where: str | Path = ""  # a folder
        deep: bool = False

        def energy(self, step):
            return torch.zeros(1)

    found = guidance_knobs("fog", Fog)
    assert found["about"] == "Thickens the fog."
    knobs = {knob["option"]: knob for knob in found["knobs"]}
    assert list(knobs)[:3] == ["scale", "start", "stop"]
    assert knobs["kind"]["choices"] == ["thin", "thick"]
    assert knobs["kind"]["comment"] == "of fog"
    kinds = {name: (knob["control"], knob["list"], knob["default"]) for name, knob in knobs.items()}
    assert kinds["count"] == ("whole", False, 3)
    assert kinds["names"] == ("text", True, ["a"])
    assert kinds["where"] == ("file", False, "")
    assert kinds["deep"] == ("switch", False, False)


@pytest.mark.parametrize("path", ["/api/runs/9999", "/api/runs/9999/events"])
def test_a_run_that_is_not_there(client, path):
    status, found = client.ask("GET", path)
    assert status == 404
    assert "no run '9999'" in found["error"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/no", 404), ("PUT", "/api", 405)])
def test_an_address_that_is_not_there_is_refused_as_all_is(client, method, path, status):
    refused(client, {}, status=status, path=path, method=method)


def test_a_refusal_of_other_words_is_none_of_a_missing_run(client):
    name = "no run .json"
    body = {"sample": {"layout": name}, "files": {name: text([])}}
    status, found = client.ask("POST", "/api/open", {"size": [48, 48], "body": body})
    assert found["error"] == "no run .json holds no object"
    assert status == 400
