"""Controls and label maps by the API: what is drawn, restored and refused."""

import base64
import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import tiny
from guidekit import LabelSet
from guidekit.__main__ import main
from guidekit.affinity import Affinity
from guidekit.affinity.matrix import parse_hand
from guidekit.testing.conditioners import control_net, t2i_adapter
from serving import Client, png, serving, text

SOURCE = LabelSet("source", ("sky", "grass", "sea", "rock"))
TARGET = LabelSet("target", ("lawn", "lake"))
IMAGE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
MAP = np.zeros((32, 32), np.uint8)
MAP[16:] = 1


@pytest.fixture(scope="module")
def kit(options, tmp_path_factory):
    """Options of a server with a ControlNet, an adapter of maps, label sets and an affinity."""
    folder, pipe = tmp_path_factory.mktemp("kit"), tiny.sd_pipeline()
    control_net(pipe).save_pretrained(folder / "net")
    t2i_adapter(pipe, channels=len(SOURCE)).save_pretrained(folder / "adapter")
    SOURCE.save(folder / "source.json")
    hand = parse_hand({"lawn": "grass", "lake": "sea"}, SOURCE, TARGET)
    Affinity(SOURCE, TARGET, {}, hand).save(folder / "A")
    return dataclasses.replace(
        options,
        out=tmp_path_factory.mktemp("out"),
        controls={name: folder / name for name in ("net", "adapter")},
        files={name: folder / name for name in ("source.json", "A")},
    )


@pytest.fixture(scope="module")
def server(kit):
    with serving(kit) as port:
        yield Client(port)


def controlled(body, **more):
    """The run with the ControlNet."""
    files = {"edges.png": png(IMAGE), "map.png": png(MAP)}
    table = {"model": "net", "image": "edges.png", "scale": 0.5, "stop": 0.5} | more
    return body | {"control": [table], "files": files}


def mapped(body, **sample):
    """The run with the adapter, which sees a map of the source's classes."""
    own = body["sample"] | {"map": "map.png", "labels": "source.json"} | sample
    return body | {
        "sample": {k: v for k, v in own.items() if v is not None},
        "control": [{"model": "adapter"}],
        "files": {"map.png": png(MAP)},
    }


def by_command_line(body, kit, tmp_path, sample=()):
    """What `guidekit sample --config` draws of the same tables."""
    for name, data in body["files"].items():
        (tmp_path / name).write_bytes(base64.b64decode(data))
    control = [c | {"model": str(kit.controls[c["model"]])} for c in body["control"]]
    tables = {"format": 1, "sample": body["sample"] | dict(sample), "control": control}
    (tmp_path / "run.json").write_text(json.dumps(tables))
    words = ["sample", "--config", str(tmp_path / "run.json"), "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(main, [*words, "--quiet"])
    assert done.exit_code == 0, done.stderr
    return np.asarray(Image.open(tmp_path / "o/3.png"))


def drawn(server, body):
    """The id of a run that was drawn, and its image."""
    run = server.finished(server.draw(body))
    assert run["state"] == "finished", run["error"]
    return run["id"], np.asarray(server.image(run["id"], "3.png"))


def test_a_control_draws_what_the_command_line_draws(server, kit, body, tmp_path):
    id, image = drawn(server, controlled(body))
    assert np.array_equal(image, by_command_line(controlled(body), kit, tmp_path))
    assert not np.array_equal(image, drawn(server, body)[1])
    (table,) = server.get(f"/api/runs/{id}")["records"][""]["control"]
    assert (table["scale"], table["stop"], table["image"]) == (0.5, 0.5, "controls/0.png")


@pytest.mark.parametrize("affinity", [None, "A"])
def test_a_label_map_draws_what_the_command_line_draws(server, kit, body, tmp_path, affinity):
    labels = None if affinity else "source.json"
    asked = mapped(body, affinity=affinity, labels=labels)
    named = {"labels": labels, "affinity": affinity}
    places = {key: str(kit.files[name]) for key, name in named.items() if name}
    _, image = drawn(server, asked)
    assert np.array_equal(image, by_command_line(asked, kit, tmp_path, places))


def test_an_image_restores_its_controls_and_its_map(server, body):
    asked = mapped(body)
    asked["control"].append({"model": "net", "image": "edges.png", "scale": 0.5})
    asked["files"]["edges.png"] = png(IMAGE)
    id, image = drawn(server, asked)
    *_, data = server.raw("GET", f"/api/runs/{id}/files/3.png")
    dropped = {"files": {"d.png": base64.b64encode(data).decode()}, "main": "d.png"}
    for opening in (dropped, {"body": server.get(f"/api/runs/{id}")["body"]}):
        status, found = server.ask("POST", "/api/open", opening | {"size": [32, 32]})
        assert (status, found["notes"]) == (200, []), found
        assert [c["model"] for c in found["control"]] == ["adapter", "net"]
        again = {key: found[key] for key in ("sample", "control", "files")}
        assert np.array_equal(drawn(server, again)[1], image)


def test_what_of_a_run_is_not_here_is_noted(server, client, body):
    size = {"size": [32, 32]}
    tables = {"sample": {"prompt": "a", "map": "map.png", "labels": "no.json"}}
    tables["control"] = [{"model": "/x/other"}, {"model": "net", "image": "controls/0.png"}, 3]
    files = {"files": {"run.json": text(tables)}, "main": "run.json"}
    status, found = server.ask("POST", "/api/open", files | size)
    assert status == 200
    assert found["control"] == []
    assert set(found["sample"]) == {"prompt"}
    notes = " ".join(found["notes"])
    for words in ("label map map.png", "labels no.json", "no control 'other'", "controls/0.png"):
        assert words in notes
    files["files"]["0.png"] = png(IMAGE)  # the file itself, without its folder
    _, found = server.ask("POST", "/api/open", files | size)
    assert found["control"] == [{"model": "net", "image": "0.png"}]


def test_what_a_server_has_is_told(server, body):
    about = server.get("/api")
    assert about["controls"] == ["adapter", "net"]
    assert "ade20k-150" in about["labels"]
    model = server.get(f"/api/models/{body['sample']['model']}")
    assert model["takes_controls"]
    assert not model["reads_map"]


@pytest.mark.parametrize("name", ["/etc", "../net", "other", "lllyasviel/net", None, 3, ["net"]])
def test_a_control_is_one_of_the_servers(server, body, name):
    status, found = server.ask("POST", "/api/runs", controlled(body, model=name))
    assert status == 400, found
    assert "this server has no control" in found["error"], found


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image": "/etc/hostname"}, "control 0: image"),
        ({"image": "../edges.png"}, "not among the files"),
        ({"image": 3}, "not among the files"),
        ({"scale": "much"}, "'scale'"),
        ({"start": 0.9}, "start < stop"),
        ({"trust": True}, "no such 'trust'"),
        ({"image": None}, "map"),
    ],
)
def test_a_control_that_cannot_work_is_refused(server, body, change, words):
    status, found = server.ask("POST", "/api/runs", controlled(body, **change))
    if status == 201:  # what only the model can tell
        found = server.finished(found["id"])
    assert words in found["error"], found


@pytest.mark.parametrize("key", ["map", "labels", "affinity"])
@pytest.mark.parametrize("value", ["/etc/hostname", "../x.png", "A/../source.json", ["map.png"]])
def test_a_map_and_its_labels_are_the_runs_or_the_servers(server, body, key, value):
    status, found = server.ask("POST", "/api/runs", mapped(body, **{key: value}))
    assert status == 400, found
    assert f"sample.{key}" in found["error"], found


def test_a_run_has_few_controls_and_classes(server, body):
    many = controlled(body)
    many["control"] *= 5
    assert "4 controls at most" in server.ask("POST", "/api/runs", many)[1]["error"]
    labels = {"classes": [f"c{i}" for i in range(2000)], "void": [70000]}
    asked = mapped(body, labels="l.json")
    asked["files"]["l.json"] = text(labels)
    assert "1024 classes at most" in server.ask("POST", "/api/runs", asked)[1]["error"]


def test_a_grid_is_not_over_maps(server, body):
    asked = mapped(body) | {"grid": ["affinity=A,"]}
    assert "no option to draw a grid over" in server.ask("POST", "/api/runs", asked)[1]["error"]


def test_two_networks_of_one_name_are_refused(kit, tmp_path):
    (tmp_path / "net").mkdir()
    words = ["serve", "--control", str(kit.controls["net"]), "--control", str(tmp_path / "net")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "two --control have the same last name" in done.stderr
