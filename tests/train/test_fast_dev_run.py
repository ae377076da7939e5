"""`guidekit train RECIPE --fast-dev-run`: every stage of every built-in recipe, in a minute."""

import json
import time
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

from guidekit.__main__ import main
from guidekit.train.recipe import read_recipe, recipes
from guidekit.worlds import objects

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory):
    """A disc under the name of every cut-out of the built-in world."""
    folder = tmp_path_factory.mktemp("cutouts")
    table = Path(objects.__file__).with_name("objects.toml")
    image = Image.new("RGBA", (32, 32))
    ImageDraw.Draw(image).ellipse((2, 2, 29, 29), fill=(230, 40, 40, 255))
    for name in tomllib.loads(table.read_text())["things"]:
        image.save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("name", recipes())
def test_every_built_in_recipe_runs_in_a_minute(name, cutouts, tmp_path):
    plan, start = read_recipe(name), time.process_time()
    words = ["train", name, "--fast-dev-run", "--out", str(tmp_path), "--json"]
    if name.startswith("objects"):
        words += ["--cutouts", str(cutouts)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    model = json.loads(done.stdout.strip().splitlines()[-1])["model"]
    folder = tmp_path / "fast-dev-run" / plan.model
    assert model == str(folder / plan.stages[-1].name / "model")
    for stage in plan.stages:
        home = folder / stage.name
        assert (home / "model").is_dir()
        assert (home / "preview-000002.png").is_file()
        rows = (home / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [1, 2]
        kept = json.loads((home / "stage.json").read_text())
        assert kept.get("compile", "False") == "False"
    assert time.process_time() - start < 60
    assert not (tmp_path / plan.model).exists()
