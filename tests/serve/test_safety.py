"""Who may speak to a server, and how much."""

import dataclasses
import socket
from pathlib import Path

import numpy as np
import pytest

from guidekit.errors import GuidekitError
from guidekit.serve.command import serve
from guidekit.serve.options import Limits, ServeOptions
from guidekit.serve.running import bound, link
from guidekit.serve.safety import is_loopback
from serving import Client, png, refused, serving, text, with_layout

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
        {"origin": "http://["},
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


def test_masks_of_a_layout_are_counted_before_they_are_read(options, body, tmp_path):
    """A map of a segment's value is a mask of each segment."""
    run = with_layout(body)
    limits = dataclasses.replace(options.limits, masks=2 * 48 * 48 - 1)
    with serving(dataclasses.replace(options, out=tmp_path, limits=limits)) as port:
        refused(Client(port), run, "the masks of a layout have")
        asked = {"files": run["files"], "main": "layout.json", "size": [48, 48]}
        refused(Client(port), asked, "the masks of a layout have", path="/api/open")


def test_segments_of_a_request_and_of_its_layout_are_counted_together(client, body):
    some = [{"phrase": "red circle", "box": [0, 0, 1, 1]}] * 3
    sample = body["sample"] | {"layout": "l.json"}
    run = body | {"sample": sample, "segment": some, "files": {"l.json": text({"segments": some})}}
    refused(client, run, "a layout has 4 segments at most")


def test_boxes_are_no_masks_of_the_map(options, body, tmp_path):
    """And a mask that is named twice is two."""
    limits = dataclasses.replace(options.limits, masks=8 * 8)
    boxes = [{"phrase": "red circle", "box": [0, 0, 1, 1]}] * 3
    layout = {"prompt": "a red circle", "map": "m.png", "segments": boxes}
    layout["segments"] = [*boxes, {"phrase": "red circle", "value": 0}]
    files = {"l.json": text(layout), "m.png": png(np.zeros((8, 8), "uint8"))}
    run = body | {"sample": body["sample"] | {"layout": "l.json"}, "files": files}
    with serving(dataclasses.replace(options, out=tmp_path, limits=limits)) as port:
        Client(port).draw(run)
        layout["segments"][0] = layout["segments"][3]
        refused(Client(port), run | {"files": files | {"l.json": text(layout)}}, "masks of a lay")


def test_a_layout_to_open_has_limits(client):
    segments = [{"phrase": "a", "box": [0, 0, 1, 1]}] * 5
    asked = {"files": {"l.json": text({"segments": segments})}, "main": "l.json", "size": [8, 8]}
    refused(client, asked, "4 segments at most", path="/api/open")
    files = {f"{i}.json": text({}) for i in range(65)}
    asked = {"files": files, "main": "0.json", "size": [8, 8]}
    refused(client, asked, "64 files at most", path="/api/open")


@pytest.mark.parametrize("key", ["prompt", "negative"])
def test_a_prompt_has_a_length(client, body, key):
    """Of the request, of a grid, of a layout, of a segment."""
    long = "a" * 10_001
    words = f"{key} has 10000 characters at most"
    refused(client, body | {"sample": body["sample"] | {key: long}}, words)
    refused(client, body | {"grid": [f"{key}={long}"]}, words)
    segment = {"phrase": "red circle", "box": [0, 0, 1, 1], key: long}
    for layout in ({key: long}, {"prompt": "a red circle", "segments": [segment]}):
        sample = {k: v for k, v in body["sample"].items() if k != "prompt"} | {"layout": "l.json"}
        run = body | {"sample": sample, "files": {"l.json": text(layout)}}
        refused(client, run, "10000 characters at most")


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


def test_every_limit_is_in_the_reference():
    page = (Path(__file__).parents[2] / "docs/reference/serve-api.md").read_text()
    for name, value in vars(Limits()).items():
        assert f"| `{name}` | {value:,} |" in page
