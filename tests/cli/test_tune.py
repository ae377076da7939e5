"""`guidekit tune`: it goes on where it stopped, writes a config, and its judge never guides."""

import json
import tomllib

import pytest
from click.testing import CliRunner
from PIL import Image

from guidekit.__main__ import main
from guidekit.cli.tune import write_best

DRAWN = ["--model", "scenes", "--seeds", "0", "--steps", "2", "--cfg", "2"]
KNOB = "layout-guidance.scale=10:40"


def invoke(*words):
    return CliRunner().invoke(main, [*map(str, words)])


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    out = tmp_path_factory.mktemp("tune") / "out"
    words = ["tune", KNOB, *DRAWN, "--judge", "prompts", "--rounds", "1", "--out", out]
    return out, words, invoke(*words)


def test_it_writes_what_sample_reads(searched, tmp_path):
    out, _, result = searched
    assert result.exit_code == 0, result.output
    state = json.loads((out / "tune.json").read_text())
    assert [row["values"] for row in state["trials"]] == [[10.0], [20.0]]
    best = max(state["trials"], key=lambda row: row["score"])
    words = ["sample", "--config", out / "best.toml", "--seeds", "0", "--out", tmp_path / "run"]
    drawn = invoke(*words, "--no-compare", "--json")
    assert drawn.exit_code == 0, drawn.output
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["plugin"]["layout-guidance"]["scale"] == best["values"][0]
    both = [Image.open(f / "0.png").tobytes() for f in (tmp_path / "run", out / best["folder"])]
    assert both[0] == both[1]


def test_it_goes_on_and_draws_nothing_twice(searched):
    out, words, _ = searched
    state = json.loads((out / "tune.json").read_text())
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    again = invoke(*words, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads((out / "tune.json").read_text()) == state
    assert json.loads(again.output)["trials"] == 2
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    other = invoke(*words, "--beam", "3")
    assert other.exit_code == 2
    assert "holds another search" in other.output


def test_a_judge_that_guides_is_refused_before_it_draws(tmp_path):
    words = ["tune", "clip.scale", "--set", "clip.encoder=scenes-clip", *DRAWN]
    words += ["--set", "clip.on=x0"]
    result = invoke(*words, "--judge", "prompts clip=scenes-clip", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "scenes-clip would guide the images" in result.output
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("knob", "says"),
    [("zest.nothing", "zest has no option 'nothing'"), ("zest.loss", "only numbers are tuned")],
)
def test_what_cannot_be_tuned_is_refused(knob, says, tmp_path):
    result = invoke("tune", knob, *DRAWN, "--judge", "prompts", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert says in result.output


def test_the_best_names_the_images_of_its_trial_from_where_it_lies(tmp_path):
    trial = tmp_path / "trials/3"
    trial.mkdir(parents=True)
    plugin = {"ilvr": {"image": "given/a.png"}, "clip": {"image": ["given/b.png", "scene-3"]}}
    table = {"sample": {"model": "scenes"}, "plugin": plugin}
    (trial / "run.json").write_text(json.dumps(table))
    found = tomllib.loads(write_best(trial / "run.json", tmp_path / "best.toml").read_text())
    assert found["plugin"]["ilvr"]["image"] == "trials/3/given/a.png"
    assert found["plugin"]["clip"]["image"] == ["trials/3/given/b.png", "scene-3"]
