"""Rows of benchmarks whose model is trained first: trained layouts, and the latent code."""

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import guidekit
from guidekit.synthesis.control_train import ControlOptions, new_control
from guidekit.worlds import digits, scenes
from guidekit.zoo.shipped import ZOO

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of an adapter and of an encoder with its model, as trainers leave them; untrained."""
    folder, pipe = tmp_path_factory.mktemp("runs"), guidekit.load("scenes", "cpu")
    own = folder / "scenes-map-encoder/both/model"
    shutil.copytree(ZOO / "scenes", own)
    for kind, place in {
        "adapter": folder / "scenes-map-adapter/control/model",
        "encoder": own / "control",
    }.items():
        new_control(ControlOptions(kind=kind), pipe, len(scenes.DENSE)).save_pretrained(place)
    return folder


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of the scripts, from which they import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_trained_layouts_are_rows_beside_the_others(benchmarks, runs):
    from layout import Bench, Setting
    from layout_trained import there

    names = ["adapter", "adapter + Zest", "encoder, both trained"]
    assert there(runs) == names
    bench = Bench(Setting("scenes", n=2, steps=2, cfg=4.0, batch=2, seed=0, trained=str(runs)))
    plain, *rows = (bench.rows(name)[0] for name in ("unguided", *names))
    assert "trained" not in plain
    for name, row in zip(names, rows, strict=True):
        assert (row["method"], row["vocabulary"], row["trained"]) == (name, "closed", "yes")
        assert row["n"] == 2
        assert row["Frechet"] != plain["Frechet"]


def test_a_row_that_was_not_trained_names_its_recipe(benchmarks, runs):
    from layout import main

    result = CliRunner().invoke(main, ["--only", "spatial", "--trained", str(runs)])
    assert result.exit_code == 2
    assert "guidekit train scenes-spatial --out RUNS" in result.output


def test_a_latent_code_is_trained_kept_and_read(benchmarks, tmp_path):
    from fewshot_code import CODE, trained_code

    code = trained_code("digits", tmp_path, steps=2, batch=4)
    images, targets = digits.split("train")
    codes = code.of(images[:2000])
    torch.testing.assert_close(codes.mean(0), torch.zeros(CODE), rtol=0, atol=1e-3)
    again = trained_code("digits", tmp_path, steps=2, batch=4)
    assert torch.equal(again.of(images[:8]), codes[:8])
    found = code.classifier(images[:20], targets[:20] % 2, 2)
    kept = code.accepted(found, each=2, pool=8, seed=0)
    assert len(kept) == 2
    assert all(len(rows) <= 2 and rows.shape[1:] == (1, 8, 8) for rows in kept)
    assert sum(map(len, kept)) > 0
    halves = (images[:4], (images[:4, 0] > 0).long())
    assert code.mask_maps(halves, images[4:6], 2).shape == (2, 8, 8)
