"""Rows of benchmarks whose model is trained first: trained layouts, and the latent code."""

import shutil
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import guidekit
from guidekit.affinity import Affinity, Estimate
from guidekit.affinity.encoders import load_texts
from guidekit.backbones.segment_map import pooled, scaled
from guidekit.evaluate.judge import load_judge
from guidekit.synthesis.control_train import ControlOptions, new_control
from guidekit.testing.conditioners import control_net, segment_map, t2i_adapter
from guidekit.worlds import digits, scenes
from guidekit.zoo.shipped import ZOO
from label_worlds import affinity, maps_pipeline

FALLBACK = "segmentation, text where unseen"
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


@pytest.fixture
def lab(benchmarks, tmp_path):
    """That of benchmarks/cat.py, with a host of other classes."""
    from cat_models import Lab, Sizes
    from fewshot_store import Store

    models = {"host": "one", "judge": "same"}
    return Lab(maps_pipeline(), load_judge(), Store(tmp_path), tmp_path, Sizes(), 0, models)


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


def test_draws_that_share_their_scenes_do_not_narrow_an_interval(benchmarks, tmp_path):
    from fewshot_scenes import Scenes, pairs, shape_iou
    from fewshot_store import Store

    _, wanted = pairs(range(50_000, 50_012), "test", 32)
    found = wanted.clone()
    found[::2] = found[::2].roll(3, -1)  # half of the scenes are read wrongly, by every draw
    same = {"found": found.numpy(), "wanted": wanted.numpy()}

    class Kept(Store):
        def cell(self, key, make):
            return same

    one, several = (Scenes("scenes-ddpm", Kept(tmp_path), 4, draws=n) for n in (1, 5))
    for alone, row in zip(one.segmentation_rows(12), several.segmentation_rows(12), strict=True):
        assert row["mIoU"] == pytest.approx(shape_iou(**same))
        wide, own = (high - low for low, high in (alone["mIoU 95%"], row["mIoU 95%"]))
        assert own > 0.8 * wide


def test_rows_ask_what_they_are_named_by(benchmarks):
    from cat_rows import SOURCE, TARGET, measured, rows_of

    def says(source, seen=1.0, nearly=()):
        scores = torch.zeros(len(SOURCE), len(TARGET)).double()
        scores[source], scores[list(nearly)] = 1.0, 0.5
        return Estimate(scores, torch.full((len(TARGET),), seen).double())

    own = {"segmentation": says(0), "features": says(1, nearly=[0]), "text": says(2)}
    found = Affinity(SOURCE, TARGET, own)
    rows = rows_of(strange=says(3), known=says(4))
    picks = {name: int(row.picks(found)[0]) for name, row in rows.items()}
    alone = {"segmentation": 0, "features": 1, "text, MiniLM": 2}
    alone |= {"text, scenes-clip": 3, "text, worlds-clip": 4}
    votes = {"vote": 0, "vote, ties to text": 2}  # of three that differ the first
    votes |= {"vote, worlds-clip": 0, "vote, worlds-clip, ties to text": 4}
    assert picks == alone | votes | {"mean of similarities": 0, FALLBACK: 0}
    agreeing = rows_of(strange=says(3), known=says(1))  # with features
    lines = {name: measured(row, found) for name, row in agreeing.items()}
    assert {name for name, line in lines.items() if "voted" in line} == set(votes)
    assert [lines[name]["ordered"] for name in votes] == [64, 64, 0, 0]
    assert [lines[name]["voted"] for name in votes] == [0, 0, 64, 64]
    # Class 0 is a red circle: right in colour for crimson and rust, in shape for one disc of each.
    assert [lines["vote"][key] for key in ("colours", "shapes too")] == [16, 2]
    unseen = replace(found, estimates=own | {"segmentation": says(0, seen=0.0)})
    assert int(rows[FALLBACK].picks(unseen)[0]) == 2
    assert measured(rows["vote"], unseen)["seen"] == 0


def test_models_are_trained_where_their_recipe_leaves_them(benchmarks, tmp_path, monkeypatch):
    import cat

    def setting(quick, **folders):
        paths = {name: tmp_path / name for name in cat.MODELS} | folders
        numbers = {"source_shots": 1, "seed": 0, "tuning": 1, "shots": (25,)}
        return cat.Setting(model="", text=tmp_path, out=tmp_path, quick=quick, **paths, **numbers)

    asked = []
    monkeypatch.setattr(cat, "train", lambda *args, **options: asked.append((args, options)))
    for name in cat.MODELS:
        (tmp_path / name).mkdir()
    there = setting(quick=False)
    assert cat.with_models(there, cat.PARTS) == there
    later = setting(quick=False, judge=tmp_path / "runs/prints-judge/judge/model")
    assert cat.with_models(later, ("affinity",)) == later  # which asks no judge
    assert asked == []
    cat.with_models(later, ("host",))
    assert asked == [(("prints-judge", tmp_path / "runs"), {})]
    for wrong in ("runs/prints-judge/judge/modle", "runs/other/judge/model", "model"):
        typo = replace(later, clip=Path(wrong))
        with pytest.raises(click.UsageError, match="guidekit train worlds-clip makes one"):
            cat.with_models(typo, cat.PARTS)
    assert len(asked) == 1
    cat.with_models(setting(quick=True), ("host",))
    assert [args[:2] for args, _ in asked[1:]] == [
        ("scenes-maps", tmp_path),
        ("prints-judge", tmp_path),
    ]
    assert all(options == {"fast_dev_run": True} for _, options in asked[1:])


def test_a_table_has_the_columns_of_all_rows(benchmarks):
    from cat import table

    lines = table([{"method": "a"}, {"method": "b", "voted": 3}]).splitlines()
    assert lines == ["| method | voted |", "| --- | --- |", "| a |  |", "| b | 3 |"]


def test_the_most_probable_class_of_a_pixel_may_be_void(benchmarks):
    from cat_rows import most_probable

    shares = torch.tensor([[0.1, 0.5, 0.2], [0.2, 0.4, 0.7]])[..., None]  # void: 0.7, 0.1, 0.1
    assert most_probable(shares)[..., 0].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_an_order_is_sure_where_intervals_are_apart(benchmarks):
    from cat_rows import TEXTS, VOTES
    from cat_words import said

    _, *others = VOTES

    def line(name, miou, frechet):
        own = {"method": name, "shots": 25, "mIoU": miou, "mIoU 95%": (miou - 0.1, miou + 0.1)}
        own |= {"Frechet": frechet, "Frechet 95%": (frechet - 0.1, frechet + 0.1)}
        return own | {"seeds": 3}

    rows = {"random": 0.1, "segmentation": 0.9, "features": 0.5, "text, MiniLM": 0.4}
    rows["text, worlds-clip"] = 1.0
    lines = [line(name, miou, 1 - miou) for name, miou in rows.items()]
    best = ["segmentation", TEXTS[1], TEXTS[1]]
    pairs = [("vote", "scratch"), *zip(VOTES, best, strict=True)]
    paired = [line("", 0.2, -0.05) | {"row": row, "less": less} for row, less in pairs]
    how = "(3 times): mIoU better, Frechet not told apart"
    assert said("fine-tuned", lines, paired) == [
        "25 shots: random is the worst in Frechet, as in the lecture",
        "25 shots: the estimates by mIoU are segmentation > features ~ text, MiniLM, in the "
        "lecture segmentation > text, MiniLM > features",
        "25 shots: the estimates by mIoU are text, worlds-clip ~ segmentation > features, in the "
        "lecture segmentation > text, worlds-clip > features",
        f'25 shots: "vote" against the best of its estimates, segmentation {how}',
        *(f'25 shots: "{v}" against the best of its estimates, {TEXTS[1]} {how}' for v in others),
        f'25 shots: "vote" against scratch {how}',
    ]


def test_an_order_of_means_alone_is_told_as_that(benchmarks):
    from cat_words import _order

    means = {"features": 0.6, "segmentation": 0.65, "text, worlds-clip": 0.7}
    own = {name: {"mIoU": m, "mIoU 95%": (m - 0.2, m + 0.2)} for name, m in means.items()}
    said = "text, worlds-clip ~ segmentation ~ features, the means as in the lecture"
    assert _order("training-free", own, "text, worlds-clip") == said
    own["text, worlds-clip"] = {"mIoU": 1.2, "mIoU 95%": (1.1, 1.3)}
    said = "text, worlds-clip > segmentation ~ features, the means as in the lecture"
    assert _order("training-free", own, "text, worlds-clip") == said


def test_many_images_say_whether_two_rows_are_apart(benchmarks):
    from cat_tables import LESS
    from cat_words import further

    line = {"shots": 25, "images": 9, LESS: -0.02, "seeds": 3, "nearer in": 2}
    spans = {"better": (-0.03, -0.01), "not told apart": (-0.03, 0.01)}
    start = '25 shots, 9 images: "vote" against scratch (3 times): Frechet'
    for words, span in spans.items():
        assert further([line | {f"{LESS} 95%": span}]) == [f"{start} {words}, nearer in 2"]


def test_rows_that_are_compared_are_trained_with_several_seeds(benchmarks, lab):
    from cat_models import Draw
    from cat_rows import DRAWN
    from cat_trained import COMPARED, repeated_rows, trainings

    counts = (25, 50, 100)
    assert {*DRAWN, "scratch"} == {*repeated_rows(25, counts)}
    assert [repeated_rows(count, counts) for count in counts[1:]] == [COMPARED, ()]
    own = Draw(0, [], affinity({"lawn": "grass"}))
    rows = {name: lambda found: torch.zeros(2).long() for name in DRAWN}
    found = trainings(lab, own, rows, COMPARED)
    assert [t.seed for t in found["vote"]] == [t.seed for t in found["scratch"]] == [0, 1, 2]
    assert len(found["segmentation"]) == 1
    assert [t.lr for t in found["vote"]] == [1e-3] * 3


def test_models_from_nothing_are_kept_for_every_host_of_their_shape(benchmarks, lab):
    from cat_trained import Training, facts_of

    other = replace(lab, models=lab.models | {"host": "another"})
    wider = replace(lab, host=guidekit.load("scenes-maps", "cpu"))
    picks, kept = torch.zeros(2).long(), []
    for training in (Training(None, False, 4), Training(picks, True, 4)):
        mine, *others = (facts_of(own, "row", 25, training) for own in (lab, other, wider))
        kept.append([facts == mine for facts in others])
    assert kept == [[True, False], [False, True]]


def test_pairs_are_of_one_seed_and_as_many_as_both_rows_have(benchmarks):
    from cat_models import Group
    from cat_tables import _both

    cells = [{"near": torch.tensor([i])} for i in range(3)]
    pairs = _both(Group("vote", 25, 3, cells), Group("scratch", 25, None, cells[:2]))
    assert [(int(p["a near"]), int(p["near"])) for p in pairs] == [(0, 0), (1, 1)]
