"""Each measure against kept libraries' own numbers, or a truth that is known."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from sklearn.neighbors import NearestNeighbors

from guidekit.evaluate import diversity, retrieval
from guidekit.evaluate.frechet import Moments, frechet, of_moments
from guidekit.evaluate.intervals import difference, interval, over_trainings
from guidekit.evaluate.kernel_distance import kernel_distance
from guidekit.evaluate.layout import LayoutCounts
from guidekit.evaluate.map_score import filled, inside
from guidekit.evaluate.overlap import mean_iou, overlaps
from guidekit.evaluate.precision_recall import precision_recall
from guidekit.evaluate.quality import Reference
from guidekit.evaluate.restoration import psnr, ssim

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(80, 6)), RNG.normal(size=(80, 6)) * 1.5 + 0.3


def test_distances_are_torch_fidelitys():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    a, b = torch.from_numpy(A), torch.from_numpy(B)
    both = [fid.fid_features_to_statistics(features) for features in (a, b)]
    theirs = fid.fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    assert frechet(A, B) == pytest.approx(theirs, rel=1e-6)
    one = {"kid_subsets": 1, "kid_subset_size": 80, "verbose": False}
    mmd = kid.kid_features_to_metric(a, b, **one)["kernel_inception_distance_mean"]
    assert kernel_distance(A, B) == pytest.approx(mmd, rel=1e-6)
    found = prc.prc_features_to_metric(a, b, verbose=False)
    assert precision_recall(a, b) == pytest.approx((found["precision"], found["recall"]))


def test_precision_and_recall_are_those_of_scikit_learns_neighbours():
    def covered(points, balls):
        radii = NearestNeighbors(n_neighbors=4).fit(balls).kneighbors(balls)[0][:, 3]
        gaps = np.linalg.norm(points[:, None] - balls[None], axis=-1)
        return (gaps <= radii + 1e-12).any(1).mean()

    found = precision_recall(torch.from_numpy(A), torch.from_numpy(B))
    assert found == pytest.approx((covered(A, B), covered(B, A)))
    assert 0.3 < found[1] < 1


def test_sums_by_shards_give_the_distance_of_the_whole():
    kept = [Moments(), Moments()]
    for moments, features in zip(kept, (A, B), strict=True):
        for shard in np.array_split(features, 7):
            moments.add(shard)
    assert of_moments(*kept) == pytest.approx(frechet(A, B), rel=1e-9)


def test_miou_is_scikit_learns_jaccard():
    found, wanted = RNG.integers(0, 5, (2, 6, 8, 8))
    inter, union = overlaps(found, wanted, classes=4)
    asked = (wanted[..., None] == np.arange(1, 5)).sum((1, 2))
    flat = wanted.ravel(), found.ravel()
    theirs = jaccard_score(*flat, labels=[1, 2, 3, 4], average="macro")
    assert mean_iou(inter, union, asked) == pytest.approx(theirs)
    inside = wanted > 0
    labelled = overlaps(found, wanted, True, classes=4)
    flat = wanted[inside], found[inside]
    theirs = jaccard_score(*flat, labels=[1, 2, 3, 4], average="macro")
    assert mean_iou(*labelled, asked) == pytest.approx(theirs)


def test_counts_by_parts_are_those_of_the_whole():
    found, wanted = RNG.integers(0, 4, (2, 9, 8, 8))
    whole, parts = LayoutCounts(3), LayoutCounts(3)
    whole.add(found, wanted)
    for i in range(0, 9, 2):
        parts.add(found[i : i + 2], wanted[i : i + 2])
    assert parts.row() == whole.row()
    assert parts.n == 9


def test_layouts_that_trainings_share_are_resampled_together():
    """More trainings that drew the same make a number no surer; those of their own layouts do."""
    cell = {"x": np.random.default_rng(0).normal(size=400)}

    def width(count, shared):
        _, (low, high) = over_trainings(lambda c: c["x"].mean(), [cell] * count, shared=shared)
        return high - low

    assert width(3, shared=True) == pytest.approx(width(1, shared=True), rel=0.15)
    assert width(3, shared=False) == pytest.approx(width(1, shared=False) / 3**0.5, rel=0.15)


def test_a_paired_difference_is_surer_than_two_intervals():
    """Of numbers that go up and down together: the shift is known, though each is not."""
    noise = RNG.normal(size=200)
    a, b = noise + 0.2 + 0.01 * RNG.normal(size=200), noise

    def mean(values):
        return lambda i: float(values[i].mean())

    value, (low, high) = difference(mean(a), mean(b), 200)
    assert value == pytest.approx(0.2, abs=0.01)
    assert low < value < high
    assert high - low < 0.01
    own = interval(mean(a), 200)
    assert own[1] - own[0] > 0.2


def test_paired_quality_of_a_shift_is_the_closed_form():
    """b = a + d: covariances are equal in every resample, so the difference is in the means."""
    rng = np.random.default_rng(1)
    a, real = rng.normal(size=(300, 3)), rng.normal(size=(300, 3))
    shift = np.array([0.5, 0, 0])
    row = Reference(real, draws=400, neighbours=3).against(a, a + shift)
    gap = a.mean(0) - real.mean(0)
    assert row["Frechet"] == pytest.approx(-2 * shift @ gap - shift @ shift, abs=1e-9)
    low, high = row["Frechet 95%"]
    # Of a normal mean, times 2 |d|.
    assert high - low == pytest.approx(2 * 1.96 * 2 * 0.5 * a[:, 0].std() / 300**0.5, rel=0.2)


def test_paired_quality_is_surer_where_images_are_alike():
    rng = np.random.default_rng(1)
    a, real = rng.normal(size=(200, 6)), rng.normal(size=(200, 6))
    b = a + 0.05 + 0.02 * rng.normal(size=a.shape)
    reference = Reference(real, draws=100, neighbours=3)
    paired, one, two = reference.against(a, b), reference.row(a), reference.row(b)
    for name in ("Frechet", "kernel", "precision", "recall"):
        assert paired[name] == pytest.approx(one[name] - two[name], abs=1e-9)
        widths = [np.diff(row[f"{name} 95%"])[0] for row in (paired, one, two)]
        assert widths[0] < 0.6 * np.hypot(*widths[1:]), name  # of what independent rows would give


def test_distances_are_clean_fids():
    """Of the same features; its own network would be downloaded and unpickled."""
    fid = pytest.importorskip("cleanfid.fid")
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (A, B)]
    assert frechet(A, B) == pytest.approx(fid.frechet_distance(*moments[0], *moments[1]), rel=1e-6)
    theirs = fid.kernel_distance(A, B, num_subsets=1, max_subset_size=80)
    assert kernel_distance(A, B) == pytest.approx(theirs, rel=1e-6)


def test_psnr_and_ssim_of_known_images():
    a = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    b = a + 0.1
    assert float(psnr(a, b)) == pytest.approx(20)
    assert float(ssim(a, a)) == 1
    # Of constant images only the term of the means is left.
    assert float(ssim(a, b)) == pytest.approx(1e-4 / (0.01 + 1e-4))
    noisy = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    assert float(ssim(noisy, 1 - noisy)) < -0.9
    shifted = torch.roll(noisy, 1, -1)
    assert abs(float(ssim(noisy, shifted))) < 0.2


def test_an_image_is_ranked_by_how_many_others_fit_its_query_better():
    real = np.eye(4)
    images, queries = np.array([[0.9, 0, 0, 0]]), np.array([[1.0, 0, 0, 0]])
    assert retrieval.ranks(images, queries, real, among=4).tolist() == [1]
    assert retrieval.ranks(images, queries[:, ::-1], real[:3], among=3).tolist() == [0]


def test_spread_is_the_mean_of_all_pairs():
    assert diversity.spread(np.array([[0.0], [1.0], [3.0]])) == pytest.approx(2)


def test_a_map_is_scored_by_its_mask():
    """A map on a quarter of its mask, half of it beside the mask."""
    mask, attention = torch.zeros(8, 8), torch.zeros(4, 4)
    mask[:4] = 1
    attention[0, :2] = attention[3, :2] = 1.0
    attention[1, 1] = 0.4  # less than half of the peak
    assert filled(attention, mask) == 0.25
    assert inside(attention, mask) == pytest.approx(2.4 / 4.4, abs=1e-4)
    assert filled(torch.ones(4, 4), mask) == 1
