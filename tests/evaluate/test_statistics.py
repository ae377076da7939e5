"""Statistics of shards, which several machines read, add up to those of the whole set."""

import json

import numpy as np
import pytest

from guidekit.evaluate.frechet import Moments
from guidekit.evaluate.judges import load_extractor
from guidekit.evaluate.rows import real_scenes
from guidekit.evaluate.statistics import read_statistics
from guidekit.worlds import scenes
from plans import run

N = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three folders: two shards of N images, and both in one."""
    folder = tmp_path_factory.mktemp("shards")
    images = real_scenes([scenes.scene(i, "test") for i in range(2 * N)])
    for i, key in enumerate(images.keys):
        for name in ("whole", "first" if i < N else "second"):
            (folder / name).mkdir(exist_ok=True)
            images.image(key).save(folder / name / f"{key}.png")
    for name in ("whole", "first", "second"):
        done = run("eval", "statistics", folder / name, "--out", folder / f"{name}.npz")
        assert done.exit_code == 0, done.stderr
    return folder


def test_shards_of_two_machines_add_up(shards, tmp_path):
    parts = (shards / "first.npz", shards / "second.npz")
    done = run("eval", "statistics", *parts, "--out", tmp_path / "sum.npz")
    assert done.exit_code == 0, done.stderr
    added, whole = (read_statistics(f) for f in (tmp_path / "sum.npz", shards / "whole.npz"))
    assert added.n == whole.n == 2 * N
    np.testing.assert_allclose(added.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(added.covariance, whole.covariance, rtol=1e-9, atol=1e-12)


def test_statistics_are_those_of_the_features(shards):
    images = real_scenes([scenes.scene(i, "test") for i in range(2 * N)])
    extractor = load_extractor("scenes-judge")
    features = np.concatenate([extractor.read([images.image(k)]) for k in images.keys])
    whole = read_statistics(shards / "whole.npz")
    np.testing.assert_allclose(whole.mean, features.mean(0), rtol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov(features, rowvar=False), atol=1e-9)
    assert whole.hashes == extractor.hashes


def test_quality_reads_statistics_as_rows_and_as_the_real_images(shards):
    first, second, real = (shards / f"{name}.npz" for name in ("first", "second", "whole"))
    done = run("eval", "quality", first, shards / "second", "--real", real, "--json")
    assert done.exit_code == 0, done.stderr
    rows = {row["images"]: row["Frechet"] for row in json.loads(done.stdout)["rows"]}
    both = {read_statistics(file).name: read_statistics(file).to(read_statistics(real))
            for file in (first, second)}  # fmt: skip
    assert rows["first.npz"] == pytest.approx(both["first.npz"])
    assert rows["second"] == pytest.approx(both["second.npz"])


def test_moments_merged_are_those_of_all():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(30, 4))
    parts = [Moments(), Moments()]
    parts[0].add(a[:10])
    parts[1].add(a[10:])
    parts[0].merge(parts[1])
    assert parts[0].n == 30
    theirs = np.cov(a, rowvar=False)
    np.testing.assert_allclose(parts[0].covariance, theirs, rtol=1e-9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("quality", "whole.npz", "first", "--real", "whole.npz"), "equal numbers of images"),
        (("quality", "whole.npz", "first.npz", "--real", "whole.npz"), "equal numbers of images"),
        (("quality", "whole.npz", "--real", "whole"), "guidekit eval statistics"),
        (("quality", "theirs.npz", "--real", "whole.npz"), "can only be --real"),
        (("quality", "first", "--real", "whole.npz", "--features", "scenes-clip"), "other weights"),
        (("quality", "first", "--real", "narrow.npz"), "has 3 features"),
        (("quality", "first", "--real", "cut.npz"), "is no .npz"),
        (("statistics", "first", "--out", "sums"), "must end in .npz"),
        (("statistics", "first.npz", "missing", "--out", "sums.npz"), "no such folder"),
        (("statistics", "theirs.npz", "--out", "sums.npz"), "can only be --real"),
    ],
)
def test_what_does_not_belong_together_is_refused(shards, monkeypatch, words, said):
    monkeypatch.chdir(shards)
    whole = read_statistics(shards / "whole.npz")
    np.savez("theirs.npz", mu=whole.mean, sigma=whole.covariance)
    np.savez("narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    (shards / "cut.npz").write_bytes((shards / "whole.npz").read_bytes()[:300])
    done = run("eval", *words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (shards / "sums.npz").exists()


def test_a_single_image_is_a_shard_but_has_no_covariance(shards, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/0.png").write_bytes((shards / "whole/0.png").read_bytes())
    done = run("eval", "statistics", tmp_path / "one", "--out", tmp_path / "one.npz")
    assert "a covariance needs two" in done.stderr
    words = (shards / "first.npz", tmp_path / "one")
    done = run("eval", "statistics", *words, "--out", tmp_path / "more.npz")
    assert done.exit_code == 0, done.stderr
    assert read_statistics(tmp_path / "more.npz").n == N + 1
