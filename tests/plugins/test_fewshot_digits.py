"""Few-shot guidance on handwritten digits: what twenty labels are worth, and the commands."""

import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler

from guidekit import Condition, Denoiser, Sampling, load
from guidekit.__main__ import main
from guidekit.heads import Examples, fit
from guidekit.heads.linear import fit_linear
from guidekit.train.digits import DigitJudge
from guidekit.worlds import digits
from guidekit.zoo.shipped import ZOO
from guidekit_fewshot import Fewshot

# The built-in model


@pytest.fixture(scope="module")
def real():
    """The built-in digits, and a head on twenty of them."""
    denoiser = Denoiser(load("digits-ddpm"))
    names = [str(digit) for digit in range(10)]
    head, report = fit(denoiser, Examples.of(*digits.shots(2), names))
    assert report.seconds < 60
    return denoiser, head


def test_twenty_labels_beat_the_pixels(real):
    denoiser, head = real
    pictures, labels = digits.split("test")
    shots, targets = digits.shots(2)
    pixels = fit_linear(shots.flatten(1).double().numpy(), targets.numpy(), 10)
    by_pixels = pixels.logits(pictures.flatten(1).double().numpy()).argmax(1) == labels.numpy()
    by_features = (head.predict(denoiser, pictures).argmax(1) == labels).float().mean()
    assert by_features > 0.85
    assert by_features > by_pixels.mean() + 0.1


def test_a_judge_sees_the_digit_that_was_asked_for(real, tmp_path):
    denoiser, head = real
    guidance = Fewshot(head=head.save(tmp_path / "head"), label="0")
    drawn = Sampling(denoiser, Condition(), [guidance], seeds=range(8), steps=12).finish()
    judge = DigitJudge.from_pretrained(ZOO / "digits-judge", dtype=torch.float32).eval()
    with torch.no_grad():
        found = judge(drawn.images * 2 - 1)[0].argmax(1)
    assert (found == 0).sum() >= 6
    assert drawn.guidances[0].accept(drawn.images).sum() >= 6


# Commands


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An unconditional pipeline of 8x8 grey images on disk, and shots beside it."""
    from diffusers import DDPMPipeline, UNet2DModel

    folder = tmp_path_factory.mktemp("commands")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    DDPMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder / "model")
    digits.write_shots(folder / "shots", 2)
    return folder


def invoke(*words):
    done = CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)
    return done.exit_code, done.output


def test_fit_then_sample_then_augment(model, tmp_path):
    head = tmp_path / "head"
    code, said = invoke("fit", model / "shots", "--model", model / "model", "--out", head)
    assert code == 0
    assert "accuracy" in said
    assert "fewshot.head" in said
    code, said = invoke(
        "sample",
        "--model",
        model / "model",
        "--plugin",
        "fewshot",
        "--set",
        f"fewshot.head={head}",
        "--set",
        "fewshot.label=7",
        "--seeds",
        "0-1",
        "--steps",
        2,
        "--out",
        tmp_path / "drawn",
        "--tries",
        2,
        "--json",
    )
    assert code == 0
    run = json.loads(said)
    assert run["plugin"]["fewshot"]["label"] == ["7"]
    assert (tmp_path / "drawn" / "1.png").exists()
    assert run["record"]["acceptance"]["fewshot"]["drawn"] >= 2
    code, said = invoke(
        "augment",
        "--model",
        model / "model",
        "--head",
        head,
        "--per-class",
        2,
        "--class",
        "3",
        "--out",
        tmp_path / "more",
        "--steps",
        2,
        "--set",
        "fewshot.threshold=0.0",
        "--json",
    )
    assert code == 0
    (row,) = json.loads(said)["classes"]
    assert row == {"label": "3", "wanted": 2, "drawn": 2, "accepted": 2, "rate": 1.0}
    assert len(list((tmp_path / "more" / "3").iterdir())) == 2


def test_fit_refuses_an_existing_folder_and_missing_shots(model, tmp_path):
    code, said = invoke("fit", tmp_path / "none", "--out", tmp_path / "head")
    assert code == 2
    assert "does not exist" in said
    code, said = invoke("fit", model / "shots", "--out", model)
    assert code == 2
    assert "exists" in said
