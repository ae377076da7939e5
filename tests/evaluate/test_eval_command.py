"""`guidekit eval` from end to end: rows, pairs and notes of every measure, rules that hold."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clips import other_clip
from guidekit.evaluate import judge as evaluate
from guidekit.evaluate.images import prompts_of, read_images
from guidekit.evaluate.judges import load_extractor, load_segmenter
from guidekit.evaluate.label_maps import held_out, read_label_maps
from guidekit.evaluate.layout import LayoutCounts
from guidekit.evaluate.retrieval import ranks
from guidekit.evaluate.rows import NO_REAL, NO_UNGUIDED, REAL, real_scenes
from guidekit.images import to_image, to_uint8
from guidekit.worlds import scenes
from guidekit.zoo.shipped import ZOO
from panoptic import NAMES, write_mask2former, write_panoptic
from plans import run
from scene_files import N


def shuffled(folder, drawn):
    """The same images, each under the next one's name."""
    folder.mkdir()
    files = sorted(drawn.glob("*.png"))
    for file, name in zip(files, [*files[1:], files[0]], strict=True):
        (folder / name.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.full
def test_layout_on_the_built_in_world_is_the_benchmarks_row(drawn, tmp_path):
    other = shuffled(tmp_path / "other", drawn)
    words = ("--maps", N, "--form", "scenes", "--paired", "--out", tmp_path / "r")
    done = run("eval", "layout", drawn, other, *words)
    assert done.exit_code == 0, done.stderr
    table = json.loads((tmp_path / "r/results.json").read_text())
    rows = {row.pop("images"): row for row in table["rows"]}
    assert list(rows) == [drawn.name, "other", "real scenes", f"{drawn.name} - other",
                          f"{drawn.name} - real scenes"]  # fmt: skip
    wanted = np.stack([scenes.labels(plan, 64) for plan in held_out(N)])
    images = read_images(drawn)
    pixels = [to_uint8(images.image(key)).float() / 255 for key in images.keys]
    seen = evaluate.see(evaluate.load_judge(), torch.stack(pixels))
    counts = LayoutCounts()
    counts.add(seen.classes, wanted)
    assert rows[drawn.name] == json.loads(json.dumps({"n": N} | counts.row()))
    assert rows["real scenes"] == rows[drawn.name]
    gain = rows[drawn.name]["mIoU"] - rows["other"]["mIoU"]
    assert rows[f"{drawn.name} - other"]["mIoU"] == pytest.approx(gain)
    assert gain > 0.3
    assert table["judge"]["sha256"]
    assert table["versions"]["torch"]
    assert "| real scenes | 12 |" in (tmp_path / "r/results.md").read_text()


@pytest.mark.full
def test_layout_is_the_table_of_the_benchmark(tmp_path, monkeypatch):
    """`eval layout` and benchmarks/layout.py measure the same drawn images alike."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import layout
    import layout_worlds

    monkeypatch.setattr(layout_worlds, "REFERENCE", 8)  # real scenes, for its other columns
    bench = layout.Bench(layout.Setting("scenes", n=6, steps=4, cfg=4.0, batch=6, seed=0))
    drawn = bench.images(list, bench.layouts.conditions, range(6))
    for key, image in enumerate(drawn):
        to_image(image).save(tmp_path / f"{key}.png")
    images = read_images(tmp_path)
    drawn = torch.stack([to_uint8(images.image(k)) for k in images.keys]).float() / 255
    table = bench.judged("unguided", drawn)
    done = run("eval", "layout", tmp_path, "--maps", 6, "--form", "scenes", "--json")
    row = json.loads(done.stdout)["rows"][0]
    shared = [name for name in row if name in table and name != "n"]
    assert len(shared) == 10  # mIoU, labelled, presence three times, with their intervals
    for name in shared:
        assert row[name] == pytest.approx(table[name]), name


@pytest.mark.full
def test_a_panoptic_sample_with_a_mask2former(tmp_path):
    maps = write_panoptic(tmp_path / "coco")
    judge = write_mask2former(tmp_path / "judge")
    images = tmp_path / "coco/images"
    words = ("--maps", maps, "--form", "panoptic", "--judge", judge, "--json")
    done = run("eval", "layout", images, *words)
    assert done.exit_code == 0, done.stderr
    table = json.loads(done.stdout)
    (row,) = table["rows"]
    assert row["n"] == 10
    assert 0 <= row["mIoU"] <= row["mIoU labelled"] <= 1
    assert table["notes"] == [NO_UNGUIDED, NO_REAL]
    found = read_label_maps(str(maps), "panoptic")
    assert found.names == NAMES
    one = found.map("3")
    assert (one[0, 0], one[-1, 0], one[10, 6]) == (3, 2, 1)


def test_a_judge_that_guided_is_refused(drawn, tmp_path):
    folder = shuffled(tmp_path / "o", drawn)
    plugin = {"clip": {"model": "scenes-clip", "scale": 1.0}}
    (folder / "run.json").write_text(json.dumps({"sample": {"prompt": "x"}, "plugin": plugin}))
    done = run("eval", "prompts", folder)
    assert done.exit_code == 2
    assert "scenes-clip guided the images" in done.stderr
    assert run("eval", "prompts", folder, "--clip", other_clip(tmp_path)).exit_code == 0


def test_captions_fit_their_own_images_best(drawn, tmp_path):
    other = shuffled(tmp_path / "other", drawn)
    for file in drawn.glob("*.txt"):
        (other / file.name).write_text(file.read_text())
    rows = json.loads(run("eval", "prompts", drawn, other, "--paired", "--json").stdout)["rows"]
    gap = rows[0]["CLIP score"] - rows[1]["CLIP score"]
    assert gap > 1
    assert rows[2]["CLIP score"] == pytest.approx(gap)
    assert rows[2]["CLIP score 95%"][0] > 0
    words = ("--real", other, "--among", N, "--json")
    (row,) = json.loads(run("eval", "retrieval", drawn, *words).stdout)["rows"]
    assert row["top 10"] >= row["top 1"] > 0.2


@pytest.mark.full
def test_quality_is_torch_fidelitys_by_our_extractor(drawn, tmp_path):
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from guidekit.evaluate.fidelity import register

    real = tmp_path / "real"
    real.mkdir()
    images = real_scenes([scenes.scene(5000 + i, "test") for i in range(N)])
    for key in images.keys:
        images.image(key).save(real / f"{key}.png")
    done = run("eval", "quality", drawn, "--real", real, "--draws", 5, "--json")
    assert done.exit_code == 0, done.stderr
    row, ceiling = json.loads(done.stdout)["rows"]
    assert row["n"] == row["n real"] == N
    assert ceiling["images"] == "real against real"
    theirs = torch_fidelity.calculate_metrics(
        input1=str(drawn), input2=str(real), feature_extractor=register("scenes-judge"), cuda=False,
        kid=True, prc=True, kid_subsets=1, kid_subset_size=N, cache=False, verbose=False,
        save_cpu_ram=True,
    )  # fmt: skip
    assert row["kernel"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert row["precision"] == pytest.approx(theirs["precision"])
    assert row["recall"] == pytest.approx(theirs["recall"])
    features = load_extractor("scenes-judge").read([images.image(k) for k in images.keys])
    values = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    np.savez(tmp_path / "real.npz", **values)
    done = run("eval", "quality", drawn, "--real", tmp_path / "real.npz", "--json")
    assert json.loads(done.stdout)["rows"][0]["Frechet"] == pytest.approx(row["Frechet"], rel=1e-6)


@pytest.mark.full
def test_layout_has_the_clip_score_of_its_prompts(drawn, tmp_path):
    other = shuffled(tmp_path / "other", drawn)
    words = ("--maps", N, "--form", "scenes", "--clip", "scenes-clip", "--paired", "--json")
    table = json.loads(run("eval", "layout", drawn, other, *words).stdout)
    own, wrong, real, gap, none = (row["CLIP score"] for row in table["rows"])
    (alone,) = json.loads(run("eval", "prompts", drawn, "--json").stdout)["rows"]
    assert real == own == pytest.approx(alone["CLIP score"])
    assert none == 0
    assert gap == pytest.approx(own - wrong)
    assert gap > 1
    assert table["clip"]["name"] == "scenes-clip"


@pytest.mark.full
def test_pairs_of_quality_retrieval_and_diversity_are_the_rows_differences(drawn, tmp_path):
    other, real = tmp_path / "other", tmp_path / "real"
    for folder in (other, real):
        folder.mkdir()
    for file in drawn.glob("*.png"):  # darker, and called by the same prompts
        Image.open(file).point(lambda v: v // 2).save(other / file.name)
    for folder in (drawn, other):
        lines = [json.dumps({"key": i, "prompt": f"{i // 2}"}) + "\n" for i in range(N)]
        (folder / "prompts.jsonl").write_text("".join(lines))
    images = real_scenes([scenes.scene(5000 + i, "test") for i in range(N)])
    for key in images.keys:
        images.image(key).save(real / f"{key}.png")
    for command, words in {
        "quality": ("--real", real, "--draws", 20),
        "retrieval": ("--real", real, "--among", N),
        "diversity": (),
    }.items():
        done = run("eval", command, drawn, other, *words, "--paired", "--json")
        assert done.exit_code == 0, done.stderr
        rows = {row["images"]: row for row in json.loads(done.stdout)["rows"]}
        gap = rows[f"{drawn.name} - other"]
        numbers = [name for name, value in gap.items() if isinstance(value, float)]
        assert numbers
        for name in numbers:
            wanted = rows[drawn.name][name] - rows["other"][name]
            assert gap[name] == pytest.approx(wanted, abs=1e-9), (command, name)
        done = run("eval", command, drawn, *words, "--paired")
        assert done.exit_code == 2
        assert "give another FOLDER" in done.stderr
    (drawn / "prompts.jsonl").unlink()


@pytest.mark.full
@pytest.mark.parametrize(
    "command",
    [("prompts",), ("diversity",), ("retrieval", "--among", 3), ("reward", "--of", "contrast")],
)
def test_real_images_have_a_row_of_their_own(command, drawn, tmp_path):
    real = tmp_path / "photos"
    real.mkdir()
    for i, file in enumerate(sorted(drawn.glob("*.png"))[:4]):
        Image.open(file).save(real / f"{i}.png")
        (real / f"{i}.txt").write_text(file.with_suffix(".txt").read_text() if i else "a ring")
    pairs = shutil.copytree(real, tmp_path / "pairs")
    for folder in (real, pairs):
        (folder / "3.txt").write_text((folder / "2.txt").read_text())
    done = run("eval", *command, pairs, "--real", real, "--json")
    assert done.exit_code == 0, done.stderr
    table = json.loads(done.stdout)
    own, of_real = table["rows"]
    assert of_real["images"] == REAL
    if command[0] != "retrieval":  # where a real image is compared with the other real ones
        assert of_real == own | {"images": REAL}
    assert table["notes"] == [NO_UNGUIDED]
    if command[0] != "retrieval":
        done = run("eval", *command, pairs, "--json")
        assert json.loads(done.stdout)["notes"] == [NO_UNGUIDED, NO_REAL]


def test_a_folder_is_not_taken_for_the_row_of_real_images(drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / REAL)
    done = run("eval", "retrieval", folder, "--real", drawn, "--among", 3)
    assert done.exit_code == 2
    assert "rename that folder" in done.stderr
    again = folder.rename(tmp_path / "real")  # a name as any other
    done = run("eval", "retrieval", again, "--real", drawn, "--among", 3, "--json")
    assert [row["images"] for row in json.loads(done.stdout)["rows"]] == ["real", REAL]


def test_a_real_image_is_not_compared_with_itself():
    real = np.eye(5)
    assert ranks(real, real, real, among=4, own=np.arange(5)).tolist() == [0] * 5
    alike = np.ones((5, 3))
    queries = np.array([[1.0, 0, 0]] * 5)
    alike[2] = (2, 0, 0)
    assert ranks(alike, queries, alike, among=4, own=np.arange(5)).tolist() == [1, 1, 0, 1, 1]


def test_inverse_and_diversity(drawn, tmp_path):
    (row,) = json.loads(run("eval", "inverse", drawn, "--real", drawn, "--json").stdout)["rows"]
    assert row["SSIM"] == pytest.approx(1)
    assert row["PSNR"] == 100
    other = shuffled(tmp_path / "other", drawn)
    words = ("--real", drawn, "--paired", "--json")
    rows = json.loads(run("eval", "inverse", drawn, other, *words).stdout)["rows"]
    for name in ("PSNR", "SSIM"):
        assert rows[2][name] == pytest.approx(rows[0][name] - rows[1][name])
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for i, file in enumerate(sorted(drawn.glob("*.png"))[:4]):
        (pairs / f"{i}.png").write_bytes(file.read_bytes())
        (pairs / f"{i}.txt").write_text(f"prompt {i // 2}")
    (row,) = json.loads(run("eval", "diversity", pairs, "--json").stdout)["rows"]
    assert (row["n"], row["prompts"]) == (4, 2)
    assert row["distance"] > 0
    done = run("eval", "diversity", drawn)
    assert done.exit_code == 2
    assert "diversity needs two" in done.stderr


def test_other_scorers_find_their_folders(drawn, tmp_path):
    prompts = prompts_of(drawn)
    metadata = tmp_path / "evaluation_metadata.jsonl"
    rows = [{"tag": "single_object", "prompt": prompts[str(i)]} for i in (3, 1)]
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--write", "geneval", "--metadata", metadata, "--out", tmp_path / "g")
    assert run("eval", "prompts", drawn, *words).exit_code == 0
    assert json.loads((tmp_path / "g/00000/metadata.jsonl").read_text()) == rows[0]
    first = Image.open(tmp_path / "g/00000/samples/0000.png")
    assert first.tobytes() == Image.open(drawn / "00000003.png").tobytes()
    words = ("--write", "t2i-compbench", "--out", tmp_path / "t")
    assert run("eval", "prompts", drawn, *words).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "t/samples").iterdir())
    assert len(names) == N
    assert any(name.startswith(f"{prompts['3']}_") for name in names)
    (tmp_path / "none.jsonl").write_text('{"prompt": "a zebra"}\n')
    words = ("--write", "geneval", "--metadata", tmp_path / "none.jsonl", "--out", tmp_path / "x")
    done = run("eval", "prompts", drawn, *words)
    assert done.exit_code == 2
    assert "'a zebra'" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("layout", "D", "--maps", 3, "--form", "voc"), "maps are one of"),
        (("layout", "D", "--maps", 3, "--form", "scenes", "--judge", "x"), "no segmenter 'x'"),
        (("layout", "nope", "--maps", 3, "--form", "scenes"), "no such folder"),
        (("quality", "D", "--real", "scenes", "--features", "x"), "no extractor 'x'"),
        (("prompts", "D", "--clip", "scenes-judge"), "reads no texts"),
        (("prompts", "D", "--write", "geneval"), "--write needs"),
    ],
)
def test_what_cannot_work_is_refused(drawn, words, message):
    done = run("eval", *(drawn if word == "D" else word for word in words))
    assert done.exit_code == 2, done.stderr
    assert message in done.stderr, done.stderr


def test_judges_say_which_weights_they_are():
    hashes = json.loads((ZOO / "hashes.json").read_text())["scenes-judge"]
    own = {v for k, v in hashes.items() if k.endswith(".safetensors")}
    assert load_segmenter("scenes-judge").hashes == own
