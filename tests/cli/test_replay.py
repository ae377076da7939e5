"""A run drawn again from its run.json: bit for bit, with other flags, under other versions."""

import json

import numpy as np
import pytest
from PIL import Image

from commands import PROMPT, SEGMENTS, draw, pictures
from plans import run


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_run_json_replays_bit_for_bit(model, tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 101  # soft, and no multiple of a power of two
    Image.fromarray(mask).save(tmp_path / "m.png")
    draw(
        model,
        "--plugin",
        "zest",
        "--set",
        "zest.scale=0.3",
        "--set",
        "zest.stop=1",
        "--batch",
        2,
        "--scheduler",
        "ddim",
        "--eta",
        "0.5",
        "--seeds",
        "4,0,7",
        segments=("red circle=m.png@0.7", SEGMENTS[1]),
    )
    (tmp_path / "m.png").unlink()
    moved = (tmp_path / "o").rename(tmp_path / "moved")
    result = run("sample", "--config", moved / "run.json", "--out", "again")
    assert result.exit_code == 0, result.stderr
    assert pictures(moved) == pictures(tmp_path / "again")
    first, second = (json.loads((f / "run.json").read_text()) for f in (moved, tmp_path / "again"))
    for key in ("sample", "plugin", "segment"):
        assert first[key] == second[key]
    assert first["record"]["energy"] == second["record"]["energy"]


def test_a_replay_says_what_is_no_longer_the_same(model, tmp_path):
    draw(model, "--seeds", 0)
    path = tmp_path / "o/run.json"
    tables = json.loads(path.read_text())
    tables["record"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(tables))
    text = run("sample", "--config", path).stdout
    assert "note     versions: torch was 1.0" in text
    assert text.count("note ") == 1


def test_flags_win_over_the_config(model, tmp_path):
    draw(model, "--seeds", 0)
    args = ("--config", "o/run.json", "--seeds", 5, "--out", "again")
    assert run("sample", *args).exit_code == 0
    assert (tmp_path / "again/5.png").is_file()
    assert not (tmp_path / "again/0.png").exists()


def test_a_png_holds_its_settings(model, tmp_path):
    draw(model, "--seeds", 0)
    settings = json.loads(Image.open(tmp_path / "o/0.png").text["guidekit"])
    assert settings["sample"]["prompt"] == PROMPT
    assert settings["seed"] == 0


def test_a_path_that_was_not_given_is_not_given_again(tmp_path):
    words = (
        "--plugin",
        "dps",
        "--set",
        "dps.measurement=scene-3",
        "--set",
        "dps.operator=inpainting",
    )
    first = run(
        "sample", "--model", "scenes-ddpm", *words, "--steps", 2, "--seeds", 0, "--out", "o"
    )
    assert first.exit_code == 0, first.stderr
    table = json.loads((tmp_path / "o/run.json").read_text())
    assert table["plugin"]["dps"]["mask"] == ""
    again = run("sample", "--config", "o/run.json", "--out", "again")
    assert again.exit_code == 0, again.stderr
    assert pictures(tmp_path / "o") == pictures(tmp_path / "again")
