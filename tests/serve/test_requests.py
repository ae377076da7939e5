"""What a request may name: the server's models, plugins and files, and its own; nothing else."""

import base64
import dataclasses
import sys

import numpy as np
import pytest
from PIL import Image

from guidekit.cli.settings import sample_keys
from guidekit.registry import Registry
from guidekit.serve.asked import ALLOWED, read_asked
from guidekit.serve.options import ServeOptions
from serving import Client, png, refused, serving, text


@pytest.mark.parametrize(
    "name", ["scenes", "/etc", "../scenes", "", "acme:x", "owner/name", 7, None]
)
def test_a_model_is_one_of_the_servers(client, body, name):
    refused(client, body | {"sample": body["sample"] | {"model": name}}, "this server has no model")
    asked = {"model": name, "prompt": "a"}
    refused(client, asked, "this server has no model", path="/api/tokens")


def test_files_of_a_request_are_no_model(model, body, tmp_path, monkeypatch):
    """Also where the server's model is a folder that was named from where it was started."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "own").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    own = ServeOptions(models=("models/own",), plugins=(), out=tmp_path / "out", device="cpu")
    run = body | {"sample": body["sample"] | {"model": "models/own"}}
    run["files"] = {"models/own/x.json": text({})}
    asked = read_asked(run, own, Registry(), tmp_path / "request")
    assert asked.settings.model == "models/own"
    with serving(own) as port:
        client = Client(port)
        assert client.finished(client.draw(run))["state"] == "finished"


def test_half_of_a_character_is_refused_before_it_is_kept(client, body):
    run = body | {"sample": body["sample"] | {"prompt": "a red circle \ud800"}}
    refused(client, run, "half of a character")
    refused(client, {"prompt": "\ud800"}, "half of a character", path="/api/tokens")
    asked = {"files": {"l.json": text({"prompt": "\ud800"})}, "main": "l.json", "size": [8, 8]}
    refused(client, asked, "half of a character", path="/api/open")
    client.get("/api/runs")


def test_what_is_deeply_nested_is_refused(client, body):
    deep = []
    for _ in range(600):
        deep = [deep]
    refused(client, body | {"record": {"x": deep}}, "too deeply nested")
    refused(client, {"body": deep}, "too deeply nested", path="/api/open")


@pytest.mark.parametrize("name", ["a/" * 8 + "x.json", "x" * 300 + ".json", "y" * 6000 + ".json"])
def test_a_files_name_has_an_end(client, body, name):
    words = "255 characters and 8 parts at most"
    refused(client, body | {"files": {name: text({})}}, words)
    asked = {"files": {name: text({})}, "main": name, "size": [8, 8]}
    refused(client, asked, words, path="/api/open")
    assert client.finished(client.draw(body))["state"] == "finished"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"sample": {"layout": []}}, ""),
        ({"sample": {"layout": "l.json"}, "files": {"l.json": text({"segments": 5})}}, "a list"),
        ({"segment": [{"phrase": "a", "mask": []}]}, ""),
        ({"segment": [5]}, "expected an object"),
    ],
)
def test_what_is_opened_of_wrong_kinds_is_no_fault_of_the_server(client, body, words):
    status, found = client.ask("POST", "/api/open", {"body": body, "size": [8, 8]})
    assert status == (400 if words else 200), found
    assert words in found.get("error", "")


def test_a_dropped_file_holds_numbers_of_json(client):
    wild = base64.b64encode(b'{"sample": {"cfg": NaN}}').decode()
    asked = {"files": {"run.json": wild}, "main": "run.json", "size": [8, 8]}
    refused(client, asked, "NaN", path="/api/open")


def test_a_plugin_is_one_of_the_servers_and_no_other_is_imported(client, body):
    for name in ("multidiffusion", "os", "../zest", "acme.fast"):
        sys.modules.pop("guidekit_multidiffusion", None)
        refused(client, body | {"plugin": {name: {}}}, f"this server has no plugin {name!r}")
        assert "guidekit_multidiffusion" not in sys.modules


@pytest.mark.parametrize("value", ["/etc/passwd", "../secret.json", "other.json", ["/etc"], 3])
@pytest.mark.parametrize("key", ["layout", "image"])
def test_paths_of_a_run_are_its_own_files(client, body, key, value):
    sample = body["sample"] | {key: value}
    refused(client, body | {"sample": sample}, f"sample.{key}", "not among the files")


@pytest.mark.parametrize("mask", ["/etc/passwd", "../../x.png", "request.json", "x.png"])
def test_a_mask_is_one_of_the_runs_files(client, body, mask):
    segment = [{"phrase": "red circle", "mask": mask}]
    refused(client, body | {"segment": segment}, "not among the files of this request")
    layout = {"prompt": "a red circle", "segments": segment}
    sample = body["sample"] | {"layout": "l.json"}
    status, _ = client.ask(
        "POST", "/api/runs", body | {"sample": sample, "files": {"l.json": text(layout)}}
    )
    assert status == 400


@pytest.mark.parametrize(
    ("plugin", "option", "value"),
    [
        ("fewshot", "head", "/etc"),
        ("fewshot", "mask", "../m.png"),
        ("ilvr", "image", "/etc/hostname"),
        ("clip", "image", ["scene-3", "/etc/hostname"]),
        ("clip", "image", "scene-3,/etc/hostname"),
        ("clip", "encoder", "/tmp/evil"),
        ("clip", "encoder", "ViT-B-32/openai"),
        ("clip", "encoder", "hf-hub:evil/clip"),
    ],
)
def test_an_option_of_a_plugin_names_no_path(client, body, plugin, option, value):
    run = body | {"plugin": {plugin: {option: value}}}
    refused(client, run, f"{plugin}.{option}", "not among the files of this request")
    if isinstance(value, str) and "," not in value:
        grid = body | {"plugin": {plugin: {}}, "grid": [f"{plugin}.{option}={value}"]}
        refused(client, grid, f"{plugin}.{option}")


def test_a_file_in_a_grid_is_the_requests_own(client, body, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the server's folder, which has a file of that name too
    (tmp_path / "home").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "home/secret.png")
    own = png(np.full((8, 8, 3), 200, "uint8"))
    run = body | {"plugin": {"ilvr": {}}, "files": {"home/secret.png": own}}
    grid = run | {"grid": ["ilvr.image=home/secret.png,scene-1"]}
    found = client.finished(client.draw(grid))
    assert found["state"] == "finished", found["error"]
    assert found["records"]["0-0"]["plugin"]["ilvr"]["image"] == "given/secret.png"
    *_, kept = client.raw("GET", f"/api/runs/{found['id']}/files/0-0/given/secret.png")
    assert kept == base64.b64decode(own)


def test_an_empty_text_is_no_file(client, body):
    run = body | {"plugin": {"clip": {"encoder": "", "text": "a"}}}
    refused(client, run, "clip.encoder", "not among the files of this request")


def test_a_request_names_no_code(client, body):
    said = ("energy.loss", "a request may not name code, such as 'antigravity:fly'")
    refused(client, body | {"plugin": {"energy": {"loss": "antigravity:fly"}}}, *said)
    grid = body | {"plugin": {"energy": {}}, "grid": ["energy.loss=antigravity:fly,"]}
    refused(client, grid, "energy.loss", "a request may not name code")
    assert "antigravity" not in sys.modules


def test_an_option_names_what_the_server_was_started_with(options, body, tmp_path):
    (tmp_path / "ref.png").write_bytes(b"")
    own = dataclasses.replace(options, out=tmp_path / "o", files={"ref.png": tmp_path / "ref.png"})
    run = body | {"plugin": {"ilvr": {"image": "ref.png"}}}
    with serving(own) as port:
        refused_ = Client(port).finished(Client(port).draw(run))
        assert str(tmp_path / "ref.png") in refused_["error"]  # it was read, and is no image


@pytest.mark.parametrize("key", sorted(set(sample_keys()) - set(ALLOWED)))
def test_where_it_runs_reads_and_writes_is_the_servers(client, body, key):
    sample = body["sample"] | {key: "/tmp/x"}
    refused(client, body | {"sample": sample}, f"{key!r} is the server's own")


def test_keys_that_a_request_may_set():
    assert set(ALLOWED) <= set(sample_keys())
    others = {"out", "device", "dtype", "compile", "image_folder", "per_image"}
    assert others <= set(sample_keys()) - set(ALLOWED)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../x.png", "leads out"),
        ("/tmp/x.png", "leads out"),
        ("a/../../x.png", "leads out"),
        ("C:\\x.png", "leads out"),
        ("x.py", "a request brings"),
        ("x.safetensors", "a request brings"),
        ("request.json", "a request brings"),
        ("x\x1b.png", "folder's name"),
        ("x.png", "not a readable image"),
    ],
)
def test_files_of_a_request_stay_in_its_folder(client, body, name, words):
    refused(client, body | {"files": {name: text({})}}, words)
    refused(
        client, {"files": {name: text({})}, "main": name, "size": [9, 9]}, words, path="/api/open"
    )


def test_a_file_is_base64(client, body):
    refused(client, body | {"files": {"x.json": "{}"}}, "base64")
    refused(client, body | {"files": {"x.json": 7}}, "base64")


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample": []},
        {"plugin": []},
        {"segment": {}},
        {"files": []},
        {"grid": [1]},
        {"record": 3},
        {"control": [{"model": "/etc"}]},
        {"format": 2},
        {"unknown": 1},
        {"sample": {"prompt": {}}},
        {"plugin": {"zest": 3}},
        {"segment": ["red circle=/etc/passwd"]},
        {"sample": {"cfg": float("nan")}},
        {"grid": ["out=/tmp,/etc"]},
        {"grid": ["model=scenes"]},
    ],
)
def test_other_tables_are_refused(client, body, wrong):
    sample = body["sample"] | wrong["sample"] if isinstance(wrong.get("sample"), dict) else None
    run = body | wrong | ({"sample": sample} if sample else {})
    status, found = client.ask("POST", "/api/runs", run)
    if status == 201:  # what only the sampler knows
        assert client.finished(found["id"])["state"] == "failed"
    else:
        assert status == 400, found


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b"\xff"])
def test_bodies_that_are_no_object(client, body):
    status, found = client.ask("POST", "/api/runs", body, {"content-type": "application/json"})
    assert status == 400
    assert found["error"]


@pytest.mark.parametrize(
    "path",
    [
        "../../../../etc/hostname",
        "%2e%2e/%2e%2e/x.json",
        "..%2f..%2fx.json",
        "/etc/hostname",
        "%2fetc%2fhostname",
        "run.json.part",
        "masks",
        "",
    ],
)
def test_files_of_a_run_stay_in_its_folder(client, body, path, options):
    (options.out.parent / "x.json").write_text("{}")
    id = client.draw(body)
    client.finished(id)
    assert client.raw("GET", f"/api/runs/{id}/files/{path}")[0] in (400, 404)


def test_the_report_of_a_run_has_no_script(client, body):
    id = client.draw(body)
    client.finished(id)
    status, headers, _ = client.raw("GET", f"/api/runs/{id}/files/index.html")
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_a_file_of_the_server_is_asked_for_by_its_name_again(model, tmp_path, body):
    Image.new("RGB", (8, 8)).save(tmp_path / "reference.png")
    files = {"ref.png": tmp_path / "reference.png"}
    own = ServeOptions(
        models=(str(model),), plugins=("ilvr",), out=tmp_path / "o", device="cpu", files=files
    )
    asked = body | {"plugin": {"ilvr": {"image": "ref.png"}}}
    asked = read_asked(asked, own, Registry(), tmp_path / "first")
    assert asked.body["plugin"] == {"ilvr": {"image": "ref.png"}}
    assert read_asked(asked.body, own, Registry(), tmp_path / "again").body == asked.body
    grid = body | {"plugin": {"ilvr": {}}, "grid": ["ilvr.image=ref.png,scene-3"]}
    first, _ = read_asked(grid, own, Registry(), tmp_path / "grid").cells
    assert first.settings.changes["ilvr"]["image"] == str(files["ref.png"].resolve())


def test_files_that_are_folders_of_others_are_refused(client, body):
    files = {"a.json": text({}), "a.json/b.json": text({})}
    refused(client, body | {"files": files}, "is a folder of another file")


@pytest.mark.parametrize("tables", [{"sample": [1]}, {"sample": {"image": [1]}}, {"plugin": 3}])
def test_a_run_of_no_such_tables_is_no_fault_of_the_server(client, tables):
    files = {"run.json": text({"sample": {}} | tables)}
    status, _ = client.ask("POST", "/api/open", {"main": "run.json", "files": files})
    assert status < 500
