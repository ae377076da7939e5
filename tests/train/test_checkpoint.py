"""Checkpoints: two are kept, damaged ones give way, numbers that are not finite are never saved."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_stop import SquareTask, loop_of

from guidekit.errors import GuidekitError
from guidekit.train.checkpoint import NEWEST, OLDER, last_checkpoint, write_checkpoint


def steps(folder):
    """The steps of the newest and of the older checkpoint."""
    found = []
    for name in (NEWEST, OLDER):
        with safe_open(folder / name, "pt") as file:
            found.append(int(file.metadata()["step"]))
    return found


def test_the_last_two_saves_are_kept(tmp_path):
    loop_of(SquareTask(), tmp_path, save_every=4).run()
    assert steps(tmp_path) == [12, 8]


@pytest.mark.parametrize("keep", [0, 5, 100])
def test_a_damaged_checkpoint_gives_way_to_the_older_which_stays(tmp_path, keep):
    loop_of(SquareTask(), tmp_path / "whole", save_every=4).run()
    loop_of(SquareTask(), tmp_path, save_every=4, steps=8).run()
    path = tmp_path / NEWEST
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(UserWarning, match=f"{NEWEST} is damaged .*{OLDER}, of step 4, is used"):
        again = loop_of(SquareTask(), tmp_path, save_every=4)
    assert again.step == 4
    write_checkpoint(tmp_path, {"x": torch.ones(1)}, {"step": 5})
    assert steps(tmp_path) == [5, 4]  # the damaged one did not push the whole one out


def test_two_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    for name in (NEWEST, OLDER):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(GuidekitError, match="is damaged .* and no other is whole; remove it"):
        loop_of(SquareTask(), tmp_path)


def test_a_kill_between_the_two_names_leaves_the_older(tmp_path):
    loop_of(SquareTask(), tmp_path, save_every=4).run()
    (tmp_path / NEWEST).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_checkpoint(tmp_path).step == 8


def test_a_step_without_a_finite_gradient_is_skipped_counted_and_said(tmp_path):
    with pytest.warns(UserWarning, match="gradient of step 9 is not finite.*skipped, 1 so far"):
        loop_of(SquareTask(bad=(9,)), tmp_path, save_every=10).run()
    rows = [json.loads(r) for r in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in rows] == [0] * 9 + [1] * 3
    saved = load_file(tmp_path / NEWEST)
    assert all(torch.isfinite(v).all() for v in saved.values())
    assert float(saved["adam.0.step"]) == 11  # of 12


def test_a_skipped_step_leaves_everything_as_it_was(tmp_path):
    loop_of(SquareTask(), tmp_path / "three", steps=3, decay="constant").run()
    with pytest.warns(UserWarning, match="skipped"):
        loop_of(SquareTask(bad=(3,)), tmp_path / "four", steps=4, decay="constant").run()
    before, after = (load_file(tmp_path / n / NEWEST) for n in ("three", "four"))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_gradient_that_stays_nan_ends_the_training_with_a_whole_checkpoint(tmp_path):
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(GuidekitError, match="not finite in 50 steps .* at step 55; lower lr"),
    ):
        loop_of(SquareTask(bad=range(6, 100)), tmp_path, steps=80, save_every=5).run()
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path / NEWEST).values())


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path):
    """Such as one that no gradient reaches."""
    task = SquareTask(at=lambda step: step == 7 and task.net.idle.data.fill_(torch.inf))
    task.net.idle = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(GuidekitError, match="weight.1.* not finite at step 8, so nothing is saved"):
        loop_of(task, tmp_path, save_every=4).run()
    assert last_checkpoint(tmp_path).step == 4
