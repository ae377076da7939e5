"""Measures against cases whose answer is known."""

import numpy as np
import pytest
import torch

from guidekit.evaluate import judge as evaluate
from guidekit.train.judge import Judge
from guidekit.worlds import scenes


def test_miou_of_shifted_box_and_of_spilling_object():
    wanted = np.zeros((1, 4, 8), int)
    wanted[:, :, :4] = 5
    shifted = np.roll(wanted, 2, 2)
    inter, union = evaluate.overlaps(shifted, wanted)
    asked = evaluate.asked_pixels(wanted)
    assert evaluate.mean_iou(inter, union, asked) == pytest.approx(8 / 24)
    everywhere = np.full_like(wanted, 5)
    full = evaluate.mean_iou(*evaluate.overlaps(everywhere, wanted), asked)
    labelled = evaluate.mean_iou(*evaluate.overlaps(everywhere, wanted, True), asked)
    assert full == pytest.approx(0.5)
    assert labelled == 1.0


def test_miou_is_over_the_set_not_the_mean_of_pictures():
    wanted = np.zeros((2, 2, 2), int)
    wanted[0, 0, 0], wanted[1] = 1, 1
    found = np.zeros_like(wanted)
    found[1] = 1
    inter, union = evaluate.overlaps(found, wanted)
    value = evaluate.mean_iou(inter, union, evaluate.asked_pixels(wanted))
    assert value == pytest.approx(4 / 5)


def test_presence_counts_objects_found_anywhere():
    wanted, found = np.zeros((1, 10, 10), int), np.zeros((1, 10, 10), int)
    wanted[0, 0, :], wanted[0, 1, :] = 3, 4
    found[0, 9, :] = 3
    found[0, 0, 0] = 4  # one pixel of a hundred is less than FOUND
    seen, asked = evaluate.presence(found, wanted)
    assert seen.tolist() == [1]
    assert asked.tolist() == [2]


def test_frechet_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, (40000, 3))
    b = rng.normal(0, 1, (40000, 3)) * [1, 2, 1] + [3, 0, 0]
    assert evaluate.frechet(a, b) == pytest.approx(9 + 1, rel=0.03)
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_unbiased_at_zero_and_grows():
    rng = np.random.default_rng(0)
    same = [
        evaluate.kernel_distance(rng.normal(size=(60, 4)), rng.normal(size=(60, 4)))
        for _ in range(200)
    ]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    far = evaluate.kernel_distance(rng.normal(size=(60, 4)), rng.normal(size=(60, 4)) + 2)
    assert far > 5 * np.std(same)


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        values = rng.normal(size=50)
        low, high = evaluate.interval(lambda i, v=values: v[i].mean(), 50, 200, seed=trial)
        inside += low <= 0 <= high
    assert 85 <= inside <= 100


def test_judge_reads_real_scenes():
    """The built-in judge names and outlines held-out scenes at both sizes."""
    judge = evaluate.load_judge()
    assert isinstance(judge, Judge)
    for size in (64, 32):
        plans = [scenes.scene(i, "test") for i in range(60)]
        images = (scenes.batch(plans, size)[0] + 1) / 2
        verdict = evaluate.see(judge, images)
        wanted = np.stack([scenes.labels(plan, size) for plan in plans])
        inter, union = evaluate.overlaps(verdict.classes, wanted)
        assert evaluate.mean_iou(inter, union, evaluate.asked_pixels(wanted)) > 0.85
        assert verdict.features.shape == (60, 64)
        assert torch.isfinite(images).all()
