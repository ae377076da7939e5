"""Images that a run was given: in its folder and in its images, so that either restores it."""

import base64
import json

import pytest
from PIL import Image

from commands import draw, pictures
from guidekit.cli.settings import dump, make_settings
from guidekit.outputs import folders
from guidekit.outputs.given import GivenImages
from guidekit.registry import Registry
from plans import run


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def red(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def test_a_run_is_drawn_again_without_the_image_that_it_followed(model, tmp_path):
    photo = red(tmp_path / "My Photo.PNG")
    draw(model, "--plugin", "ilvr", "--set", f"ilvr.image={photo}")
    content = photo.read_bytes()
    photo.unlink()
    moved = (tmp_path / "o").rename(tmp_path / "moved")
    table = json.loads((moved / "run.json").read_text())
    assert table["plugin"]["ilvr"]["image"] == "given/my-photo.png"
    assert (moved / "given/my-photo.png").read_bytes() == content
    result = run("sample", "--config", moved / "run.json", "--out", "again")
    assert result.exit_code == 0, result.stderr
    assert pictures(moved) == pictures(tmp_path / "again")


def test_every_image_carries_what_its_run_was_given(model, tmp_path):
    photo = red(tmp_path / "photo.png")
    draw(model, "--plugin", "ilvr", "--set", f"ilvr.image={photo}")
    drawn = next((tmp_path / "o").glob("*.png"))
    carried = json.loads(Image.open(drawn).text["guidekit"])["files"]
    assert base64.b64decode(carried["given/photo.png"]) == photo.read_bytes()


def test_two_images_of_one_name_are_two_files(tmp_path):
    a, b = red(tmp_path / "a/x.png"), red(tmp_path / "b/x.png")
    made = Registry().make_guidance("ilvr", {"image": str(a)})
    settings = make_settings({"plugin": {"ilvr": {"image": str(a)}}}, {"image": b})
    given = GivenImages()
    tables = given.renamed(dump(settings), [made])
    assert tables["sample"]["image"] == "given/x.png"
    assert tables["plugin"]["ilvr"]["image"] == "given/x-2.png"
    assert given.sources == {"given/x.png": b, "given/x-2.png": a}


def test_built_in_references_keep_their_name(model, tmp_path):
    draw(model, "--plugin", "ilvr", "--set", "ilvr.image=scene-3")
    table = json.loads((tmp_path / "o/run.json").read_text())
    assert table["plugin"]["ilvr"]["image"] == "scene-3"
    assert not (tmp_path / "o/given").exists()
    result = run("sample", "--config", "o/run.json", "--out", "again")
    assert result.exit_code == 0, result.stderr
    assert pictures(tmp_path / "o") == pictures(tmp_path / "again")


def test_files_that_a_server_offers_are_not_copied(tmp_path):
    photo = red(tmp_path / "photo.png")
    made = Registry().make_guidance("ilvr", {"image": str(photo)})
    settings = make_settings({"plugin": {"ilvr": {"image": str(photo)}}}, {})
    given = GivenImages(offered=[photo])
    assert given.renamed(dump(settings), [made])["plugin"]["ilvr"]["image"] == str(photo)
    assert given.sources == {}


def test_files_that_do_not_fit_are_left_out_and_others_kept(monkeypatch):
    monkeypatch.setattr(folders, "CARRIED", 12)
    found = folders.carried({"a": b"123456", "large": bytes(90), "b": b"1"})
    assert list(found["files"]) == ["a", "b"]
    assert folders.carried({"large": bytes(90)}) == {}
