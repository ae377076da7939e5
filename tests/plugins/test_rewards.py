"""Rewards that guide and rewards that judge: what guided a run never judges its images."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from clips import other_clip
from guidekit import Condition, GuidekitError, Sampling
from guidekit.bases.rewards import Reward, as_reward, brightness, contrast
from guidekit.evaluate.commands import prompts
from guidekit.zoo.shipped import ZOO
from guidekit_fk import FeynmanKac
from guidekit_reno import Reno
from guidekit_search import Search
from plans import run

WEIGHTS = (ZOO / "scenes-clip",)
REWARD = Reward("seen by scenes-clip", contrast, weights=WEIGHTS)  # as its own code would say
JUDGE = Reward("bright", brightness, role="judges")


def drawn(guidance):
    given = {"seeds": [0, 1], "steps": 2, "particles": 2}
    return Sampling(tiny.sd_pipeline(), Condition("a red circle"), [guidance], **given)


@pytest.mark.parametrize("cls", [FeynmanKac, Search, Reno])
def test_one_that_judges_does_not_guide(cls):
    with pytest.raises(GuidekitError, match="the reward bright judges, so it cannot guide"):
        drawn(cls(reward=JUDGE)).finish()


def test_what_guided_a_run_does_not_judge_it(tmp_path):
    sampling = drawn(Search(reward=REWARD, candidates=1)).finish()
    (noted,) = sampling.account.guides.values()
    assert frozenset(noted) == REWARD.hashes
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    table = {"sample": {"prompt": "x"}, "plugin": {"search": {"reward": REWARD.stated}}}
    table["record"] = {"guides": sampling.account.guides}
    (tmp_path / "run.json").write_text(json.dumps(table))
    with pytest.raises(GuidekitError, match=r"scenes-clip guided the images .*\(search\)"):
        prompts([tmp_path], "scenes-clip")
    other = other_clip(tmp_path.with_name("judge"))
    assert prompts([tmp_path], str(other)).rows


def test_rewards_are_measured_by_the_command_line(tmp_path):
    for key, grey in enumerate((0, 255)):
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / f"{key}.png")
    words = ("eval", "reward", tmp_path, "--of")
    (row,) = json.loads(run(*words, "brightness", "--json").stdout)["rows"]
    assert row["reward"] == pytest.approx(0)
    assert row["n"] == 2
    table = {"sample": {}, "plugin": {"fk": {"reward": "brightness"}}}
    (tmp_path / "run.json").write_text(json.dumps(table))
    done = run(*words, "brightness")
    assert done.exit_code == 2
    assert "brightness guided the images" in done.stderr
    assert run(*words, "contrast").exit_code == 0


def test_functions_and_names_are_rewards():
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(as_reward(contrast, "it")(images), as_reward("contrast", "it")(images))
    assert as_reward(contrast, "it").role == "guides"
    with pytest.raises(GuidekitError, match="no weights nowhere"):
        Reward("x", contrast, weights=(Path("nowhere"),))
    with pytest.raises(GuidekitError, match="role is guides or judges"):
        Reward("x", contrast, role="guide")
