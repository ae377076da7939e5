"""Rows of benchmarks whose model is trained first: trained layouts, and the latent code."""

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import guidekit
from guidekit.affinity.encoders import load_texts
from guidekit.backbones.segment_map import pooled, scaled
from guidekit.synthesis.control_train import ControlOptions, new_control
from guidekit.testing.conditioners import control_net, segment_map, t2i_adapter
from guidekit.worlds import digits, scenes
from guidekit.zoo.shipped import ZOO

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of all controls, some with their own model, as trainers leave them; all random."""
    folder, pipe = tmp_path_factory.mktemp("runs"), guidekit.load("scenes", "cpu")
    count = len(scenes.DENSE)
    both, spatial = (
        folder / "scenes-map-encoder/both/model",
        folder / "scenes-spatial/spatial/model",
    )
    shutil.copytree(ZOO / "scenes", both)
    widened, segments = segment_map(pipe, channels=128)  # of scenes-clip
    widened.save_pretrained(spatial)
    encoder = new_control(ControlOptions(kind="encoder"), pipe, count, 64)
    for control, place in (
        (t2i_adapter(pipe, channels=count), folder / "scenes-map-adapter/control/model"),
        (control_net(pipe, channels=count), folder / "scenes-map-controlnet/control/model"),
        (encoder, folder / "scenes-map-encoder/encoder/model"),
        (encoder, both / "control"),
        (segments, spatial / "control"),
    ):
        control.save_pretrained(place)
    return folder


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of the scripts, from which they import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_trained_layouts_are_rows_beside_the_others(benchmarks, runs):
    from layout import Bench, Setting
    from layout_trained import TRAINED, there

    names = there(runs)
    assert names == [*TRAINED]
    bench = Bench(Setting("scenes", n=2, steps=2, cfg=4.0, batch=2, seed=0, trained=str(runs)))
    plain, *rows = (bench.rows(name)[0] for name in ("unguided", *names))
    assert "trained" not in plain
    for name, row in zip(names, rows, strict=True):
        kind = "open" if name.startswith("spatial") else "closed"
        assert (row["method"], row["vocabulary"], row["trained"]) == (name, kind, "yes")
        assert row["n"] == 2
        assert row["Frechet"] != plain["Frechet"]


def test_without_a_prior_a_segment_holds_what_clip_makes_of_its_phrase(benchmarks):
    from layout_trained import without_prior

    pipe, phrases = guidekit.load("scenes", "cpu"), scenes.CLASSES[::7]
    bare = without_prior(segment_map(pipe, channels=128)[1], pipe)
    wanted = load_texts("scenes-clip", guidekit.load)(phrases)
    found = bare(pooled(pipe, phrases).float())
    torch.testing.assert_close(found, scaled(wanted), rtol=0, atol=1e-2)


def test_a_row_that_was_not_trained_names_its_recipe(benchmarks, tmp_path):
    from layout import main

    result = CliRunner().invoke(main, ["--only", "spatial", "--trained", str(tmp_path)])
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
