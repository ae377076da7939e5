"""Readout heads: pairs of files, a fit that learns brightness, guidance towards a map."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from guidekit import Condition, Sampling
from guidekit.__main__ import main
from guidekit.backbones.denoiser import Denoiser
from guidekit.errors import GuidekitError
from guidekit.heads.pairs import Pairs, at_grid, read_pairs, read_target
from guidekit.heads.readout import load_readout, new_readout
from guidekit.heads.readout_fit import ReadoutOptions, fit_readout
from guidekit.testing.miniatures import ddpm_pipeline, sd_pipeline
from guidekit_readout import Readout


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser(ddpm_pipeline())


def blobs(count, channels, side):
    """Images of flat patches, and the brightness of each pixel."""
    generator = torch.Generator().manual_seed(1)
    cells = torch.rand(count, 1, 2, 2, generator=generator) * 2 - 1
    images = cells.repeat_interleave(side // 2, 2).repeat_interleave(side // 2, 3)
    return images.expand(-1, channels, -1, -1), images


@pytest.fixture(scope="module")
def fitted(denoiser):
    channels, side, _ = denoiser.latent_shape(None, None)
    images, targets = blobs(24, channels, side)
    pairs = Pairs(len(images), images.__getitem__, targets.__getitem__)
    return fit_readout(denoiser, pairs, ReadoutOptions(steps=60, batch=4, rate=5e-3))


@pytest.mark.full
def test_it_explains_held_out_targets(fitted):
    head, report = fitted
    assert report.scores["explained_at_100"] > 0.3
    assert report.scores["explained_at_100"] > report.scores["explained_at_900"]
    assert head.config.scores == report.scores


@pytest.mark.full
def test_it_survives_its_file_and_refuses_another_backbone(fitted, denoiser, tmp_path):
    head, _ = fitted
    head.save(tmp_path / "head")
    again = load_readout(tmp_path / "head", denoiser)
    assert again.config == head.config
    for name, weight in head.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    with pytest.raises(GuidekitError, match="another backbone"):
        load_readout(tmp_path / "head", Denoiser(sd_pipeline()))
    table = json.loads((tmp_path / "head" / "head.json").read_text())
    for wrong, says in (({"kind": "masks"}, "one of 'masks'"), ({"width": -1}, "damaged")):
        (tmp_path / "head" / "head.json").write_text(json.dumps(table | wrong))
        with pytest.raises(GuidekitError, match=says):
            load_readout(tmp_path / "head", denoiser)


@pytest.mark.full
def test_guidance_brings_the_map_nearer(fitted, denoiser, tmp_path):
    fitted[0].save(tmp_path / "head")
    energies = {}
    for scale in (1e-9, 300.0):
        guidance = Readout(head=tmp_path / "head", level=0.8, scale=scale, stop=1.0)
        sampling = Sampling(denoiser, Condition(), [guidance], seeds=[3], steps=4).finish()
        energies[scale] = sampling.account.rows[-1]["energy"][0]
    assert energies[300.0] < 0.8 * energies[1e-9]


def test_a_target_of_the_image_and_its_free_pixels(denoiser):
    side = denoiser.latent_shape(None, None)[1]
    target = torch.full((side, side), torch.nan)
    target[: side // 2] = 1.0
    guidance = Readout.example()
    guidance.level = None
    condition = Condition(targets={"readout": target})
    step = next(iter(Sampling(denoiser, condition, [guidance], seeds=[3], steps=2)))
    assert torch.isfinite(step.prediction).all()
    head = new_readout(denoiser, 1)
    found = torch.zeros(1, 1, 2, 2)
    wanted = torch.tensor([[[[2.0, torch.nan], [torch.nan, torch.nan]]]])
    assert head.loss(found, wanted).tolist() == [4.0]
    with pytest.raises(GuidekitError, match="needs a target"):
        Sampling(denoiser, Condition(), [guidance], seeds=[3], steps=2)


def folder(path, count=4):
    for part in ("images", "targets"):
        (path / part).mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 16), (60 * i, 0, 0)).save(path / "images" / f"{i}.png")
        Image.new("L", (20, 16), 51 * i).save(path / "targets" / f"{i}.png")
    return path


def test_pairs_of_files(tmp_path):
    folder(tmp_path / "pairs")
    np.save(tmp_path / "pairs" / "targets" / "0.npy", np.full((16, 20), 7.0))
    (tmp_path / "pairs" / "targets" / "0.png").unlink()
    pairs = read_pairs(tmp_path / "pairs", (8, 8))
    images, targets = pairs.batch([0, 3], (4, 4))
    assert images.shape == (2, 3, 8, 8)
    assert targets.shape == (2, 1, 4, 4)
    assert targets[0].unique().tolist() == [7.0]
    assert targets[1].mean().item() == pytest.approx(0.6)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((2, 2), 65535, np.uint16)).save(deep)
    assert read_target(deep).tolist() == [[[1.0, 1.0], [1.0, 1.0]]]
    (tmp_path / "pairs" / "targets" / "1.png").unlink()
    with pytest.raises(GuidekitError, match="'1' and 0 others lack image or target"):
        read_pairs(tmp_path / "pairs", (8, 8))
    with pytest.raises(GuidekitError, match="no images/ and targets/"):
        read_pairs(tmp_path, (8, 8))


def test_a_map_at_another_grid_keeps_its_mean():
    target = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(at_grid(target, (2, 2)).mean((1, 2)), target.mean((1, 2)))
    assert at_grid(target, (8, 8)) is target


def test_fit_says_what_to_type_next(tmp_path):
    folder(tmp_path / "pairs")
    words = [str(tmp_path / "pairs"), "--kind", "readout", "--out", str(tmp_path / "head")]
    words += ["--model", "digits-ddpm", "--iterations", "2", "--batch", "2"]
    result = CliRunner().invoke(main, ["fit", *words])
    assert result.exit_code == 0, result.output
    assert "readout.head" in result.output
    assert (tmp_path / "head" / "head.json").exists()
    other = ["fit", *words[:1], "--iterations", "3", "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(main, other)
    assert result.exit_code == 2
    assert "--kind readout" in result.output
