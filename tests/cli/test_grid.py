"""`--grid`: a run for every combination of values, and a sheet that shows them."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from guidekit.__main__ import main
from guidekit.cli import models
from guidekit.cli.grid import Axis, cells_of, parse_axes
from guidekit.cli.settings import Settings
from guidekit.errors import GuidekitError

SEGMENT = "red circle=0,0,0.5,1"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(model, *args, fails=False):
    """The result of `guidekit sample` with a layout."""
    words = ["sample", "--model", model, "--prompt", "a red circle on white", "--out", "o"]
    words += ["--segment", SEGMENT, "--steps", 1, "--seeds", "0-1", *args]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert (result.exit_code == 2) == fails, (result.stderr, result.exception)
    return result


@pytest.mark.full
def test_a_cell_is_the_run_of_its_values(model, monkeypatch):
    loaded = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *args: loaded.append(args[0]) or load(*args))
    grid = ("--plugin", "zest", "--grid", "zest.scale=0.5,2", "--grid", "cfg=1,3")
    done = json.loads(run(model, *grid, "--json").stdout)
    assert loaded == [str(model)]
    assert [(c["row"], c["column"]) for c in done["cells"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    own = ("--plugin", "zest", "--set", "zest.scale=2", "--cfg", 3, "--no-compare", "--quiet")
    run(model, *own, "--out", "alone")
    for seed in (0, 1):
        cell, alone = (Image.open(f"{f}/{seed}.png") for f in (done["cells"][3]["folder"], "alone"))
        assert np.array_equal(cell, alone)
    sheet = np.asarray(Image.open(done["sheet"]))
    block = np.asarray(Image.open("alone/0.png").convert("RGB"))
    side = 128 // block.shape[0]
    large = block.repeat(side, 0).repeat(side, 1)
    corner = sheet[-10 - 128 : -10, -10 - 260 : -10 - 132]  # last cell, its first image
    assert np.array_equal(corner, large)


def test_one_option_is_a_row(model):
    text = run(model, "--grid", "cfg=1,2,3").stdout
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("cell")] == [
        "cell     0-0",
        "cell     0-1",
        "cell     0-2",
    ]
    assert "wrote    o/: sheet.png, and a folder for each of 3 cells" in text
    width, height = Image.open("o/sheet.png").size
    assert width > 2 * height


def test_values_are_those_of_the_command_line():
    settings = Settings(plugin={"zest": {}})
    cells = cells_of(settings, parse_axes(["zest.loss=bce,mse", "steps=5,10"]))
    assert [cell.settings.changes["zest"]["loss"] for cell in cells] == ["bce", "bce", "mse", "mse"]
    assert [cell.settings.steps for cell in cells] == [5, 10, 5, 10]
    assert not any(cell.settings.compare for cell in cells)
    assert parse_axes(["zest.stop = 0.25, 0.5"]) == (Axis("zest.stop", ("0.25", "0.5")),)


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (["zest.scale"], "write OPTION=VALUES"),
        (["zest.scale="], "write OPTION=VALUES"),
        (["cfg=1,1"], "a value occurs twice"),
        (["cfg=1", "cfg=2"], "is given twice"),
        (["cfg=1", "eta=0", "steps=1"], "one or two options, not 3"),
        (["pag.scale=1"], "'pag' is not among the plugins of this run (zest)"),
        (["model=a,b"], "no such option"),
        (["cfg=much"], "cfg must be a number"),
        (["zest.nothing=1"], "zest has no option 'nothing'"),
    ],
)
def test_what_a_grid_cannot_be(model, tmp_path, grid, says):
    words = [word for text in grid for word in ("--grid", text)]
    assert says in run(model, "--plugin", "zest", *words, fails=True).stderr
    assert not (tmp_path / "o").exists()


def test_a_data_set_has_no_grid(tmp_path):
    with pytest.raises(GuidekitError, match="not for image_folder"):
        cells_of(Settings(image_folder=tmp_path), parse_axes(["cfg=1,2"]))
