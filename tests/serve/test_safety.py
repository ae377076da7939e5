"""Who may speak to a server, and what a request may name."""

import dataclasses
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from guidekit.cli.serve import serve
from guidekit.cli.settings import sample_keys
from guidekit.errors import GuidekitError
from guidekit.registry import Registry
from guidekit.serve.asked import ALLOWED, read_asked
from guidekit.serve.options import ServeOptions
from guidekit.serve.running import bound, link
from guidekit.serve.safety import is_loopback
from serving import Client, png, serving, text


def refused(client, body, *words, status=400, path="/api/runs", headers=None):
    """Checks that a request is refused in one line with these words."""
    found, answer = client.ask("POST", path, body, headers)
    assert found == status, answer
    assert "\n" not in answer["error"]
    for word in words:
        assert word in answer["error"]


# Who


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_name_that_is_not_its_own_is_refused(client, host):
    assert client.raw("GET", "/api", headers={"host": host})[0] == 421
    assert client.raw("GET", "/", headers={"host": host})[0] == 421


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:9000", "LOCALHOST:80"])
def test_its_own_names_are_answered(client, host):
    assert client.raw("GET", "/api", headers={"host": host})[0] == 200


def test_an_address_of_the_network_is_no_name_of_a_local_server(client):
    assert client.raw("GET", "/api", headers={"host": "10.0.0.7"})[0] == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_pages_of_others_change_nothing(client, body, headers):
    refused(client, body, "may not use this server", status=403, headers=headers)
    assert client.raw("DELETE", "/api/runs/0001", headers=headers)[0] == 403
    assert client.raw("GET", "/api/models", headers=headers)[0] == 403


def test_its_own_page_may(client, body):
    host = f"127.0.0.1:{client.port}"
    headers = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    status, run = client.ask("POST", "/api/runs", body, headers)
    assert status == 201
    client.finished(run["id"])


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_form_can_send_is_refused(client, body, kind):
    refused(client, body, "application/json", status=415, headers={"content-type": kind})


def test_no_other_site_reads_an_answer(client):
    _, headers, _ = client.raw("GET", "/api", headers={"origin": "http://evil.example"})
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_the_page_runs_its_own_scripts_alone(client):
    _, headers, page = client.raw("GET", "/")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert b"http://" not in page
    assert b"https://" not in page


# Token


@pytest.fixture(scope="module")
def guarded(options, tmp_path_factory):
    """The port of a server that other hosts may reach, by its token."""
    own = dataclasses.replace(
        options, out=tmp_path_factory.mktemp("guarded"), host="0.0.0.0", token="s3cret"
    )
    with serving(own) as port:
        yield port


def test_a_server_with_a_token_answers_who_knows_it(guarded):
    client = Client(guarded)
    for path in ("/", "/api", "/api/runs", "/static/main.js", "/?token=wrong", "/api?token=s3cret"):
        assert client.raw("GET", path)[0] == 401, path
    assert client.ask("POST", "/api/runs", {})[0] == 401
    assert client.raw("GET", "/api", headers={"authorization": "Bearer s3cret"})[0] == 200
    assert client.raw("GET", "/api", headers={"authorization": "Bearer wrong"})[0] == 401


def test_the_link_becomes_a_cookie(guarded):
    client = Client(guarded)
    status, headers, _ = client.raw("GET", "/?token=s3cret")
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    sent = {"cookie": cookie.partition(";")[0]}
    assert client.raw("GET", "/", headers=sent)[0] == 200
    assert client.raw("GET", "/api", headers=sent | {"host": "10.0.0.7:80"})[0] == 200
    assert client.raw("GET", "/api", headers=sent | {"host": "evil.example"})[0] == 421


def test_other_hosts_get_a_token_and_this_one_none(monkeypatch):
    import guidekit.serve.running

    seen = []
    monkeypatch.setattr(
        guidekit.serve.running, "run_server", lambda options, *_: seen.append(options)
    )
    for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.0.5"):
        serve.main(["--host", host, "--plugin", "pag"], standalone_mode=False)
    tokens = [options.token for options in seen]
    assert tokens[:3] == [None] * 3
    assert all(len(token) >= 32 for token in tokens[3:])
    assert tokens[3] != tokens[4]
    (host,) = (option for option in serve.params if option.name == "host")
    assert host.default == "127.0.0.1"
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "example.org")] == [
        True,
        True,
        False,
    ]


def test_a_port_that_is_taken_is_told():
    with bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert link(ServeOptions(models=(), plugins=(), out=None), first).endswith(f":{port}/")
        with pytest.raises(GuidekitError, match="choose another by --port"):
            bound("127.0.0.1", port)


# How much


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"steps": 51}, "steps is 50 at most"),
        ({"seeds": list(range(5))}, "4 images at most"),
        ({"seeds": "0-99999"}, "4 images at most"),
        ({"width": 264}, "width is 256 at most"),
        ({"height": 10**9}, "height is 256 at most"),
        ({"particles": 5}, "particles is 4 at most"),
        ({"batch": 5}, "batch is 4 at most"),
        ({"tries": 9}, "tries is 8 at most"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_a_run_has_limits(client, body, change, word):
    refused(client, body | {"sample": body["sample"] | change}, word)


def test_a_grid_has_the_limits_of_a_run(client, body):
    refused(client, body | {"grid": ["steps=1,999"]}, "steps is 50 at most")
    refused(client, body | {"grid": ["cfg=1,2,3,4", "steps=1,2"]}, "6 cells at most")
    many = ",".join(str(number) for number in range(1, 5000))  # too many even to be written out
    refused(client, body | {"grid": [f"cfg={many}", f"eta={many}"]}, "6 cells at most")


@pytest.mark.parametrize("name", ["image", "layout", "map", "device", "dtype", "compile", "out"])
def test_a_grid_is_over_what_a_request_may_set(client, body, name):
    refused(client, body | {"grid": [f"{name}=/etc/hostname,cuda"]}, f"{name!r} is no option")


def test_a_layout_has_limits(client, body):
    segments = [{"phrase": "red circle", "box": [0, 0, 1, 1]}] * 5
    refused(client, body | {"segment": segments}, "4 segments at most")
    layout = {"prompt": "a red circle", "segments": segments}
    sample = body["sample"] | {"layout": "l.json"}
    many = body | {"sample": sample, "files": {"l.json": text(layout)}}
    refused(client, many, "4 segments at most")


def test_a_body_has_a_size(client, options):
    most = options.limits.body
    headers = {"content-type": "application/json", "content-length": str(most + 1)}
    with socket.create_connection(("127.0.0.1", client.port)) as line:
        lines = [f"{name}: {value}" for name, value in headers.items()]
        line.sendall(
            "\r\n".join(["POST /api/runs HTTP/1.1", "host: localhost", *lines, "", ""]).encode()
        )
        assert b" 413 " in line.recv(200)


def test_a_body_that_does_not_say_its_size_is_counted(options, tmp_path):
    limits = dataclasses.replace(options.limits, body=1000)
    with serving(dataclasses.replace(options, out=tmp_path, limits=limits)) as port:
        with socket.create_connection(("127.0.0.1", port)) as line:
            start = (
                "POST /api/runs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            )
            line.sendall(f"{start}transfer-encoding: chunked\r\n\r\n".encode())
            line.sendall(b"400\r\n" + b" " * 1024 + b"\r\n0\r\n\r\n")
            assert b" 413 " in line.recv(200)


def test_the_queue_has_an_end(options, body, tmp_path):
    limits = dataclasses.replace(options.limits, queue=2)
    with serving(dataclasses.replace(options, out=tmp_path, limits=limits)) as port:
        client = Client(port)
        long = body | {"sample": body["sample"] | {"steps": 50, "seeds": [0, 1, 2, 3]}}
        answers = [client.ask("POST", "/api/runs", long) for _ in range(5)]
        assert [status for status, _ in answers].count(429) >= 2
        assert "the queue is full" in answers[-1][1]["error"]


def test_an_image_of_a_request_has_a_size(options, body, tmp_path):
    limits = dataclasses.replace(options.limits, pixels=100)
    with serving(dataclasses.replace(options, out=tmp_path, limits=limits)) as port:
        big = body | {"files": {"m.png": png(np.zeros((11, 11), "uint8"))}}
        refused(Client(port), big, "121 pixels; 100 at most")


# What


@pytest.mark.parametrize(
    "name", ["scenes", "/etc", "../scenes", "", "acme:x", "owner/name", 7, None]
)
def test_a_model_is_one_of_the_servers(client, body, name):
    refused(client, body | {"sample": body["sample"] | {"model": name}}, "this server has no model")
    asked = {"model": name, "prompt": "a"}
    refused(client, asked, "this server has no model", path="/api/tokens")


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
