"""The task `spatial`: what its maps hold, its prior, the loss of a model that is not moved yet."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

import guidekit
import tiny
from guidekit import Condition, Control, GuidekitError, Segment
from guidekit.affinity.shots import read_shots
from guidekit.backbones.segment_map import scaled
from guidekit.synthesis.data import ShotExamples
from guidekit.synthesis.spatial_train import SpatialOptions, SpatialTask, crop, fitted_prior
from label_worlds import GARDEN, label_map, write_shots

YARD = replace(GARDEN, things=("pond",))


def embed(crops):
    """Mean colour, which is that of the segment on grey, and three numbers of no meaning."""
    means = crops.mean((2, 3))
    return torch.cat([means, means.square() + 0.1], 1)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    shots = read_shots(write_shots(tmp_path_factory.mktemp("shots"), YARD, side=32))
    examples = ShotExamples(shots, YARD, 32, 1, flips=False)
    options = SpatialOptions(source="shots", pairs=8, wordless=0.0, mapless=0.0)
    return SpatialTask(options, examples, tiny.sd_pipeline(), embed, 16)


def test_a_widened_backbone_has_its_own_loss_before_it_moves(task):
    plain = tiny.sd_pipeline().unet
    batch = task.batch(range(4), torch.Generator().manual_seed(0))
    assert batch["z"].shape == (4, 4, 16, 16)
    assert batch["maps"].shape == (4, 6, 16, 16)
    with torch.no_grad():
        out = plain(batch["z"], batch["timestep"], batch["states"]).sample
        torch.testing.assert_close(task.net(**batch)["mse"], F.mse_loss(out, batch["target"]))
    task.net(**batch)["mse"].backward()
    assert task.net.unet.conv_in.weight.grad[:, 4:].abs().sum() > 0
    assert task.held_out() == task.held_out() > 0


def test_maps_hold_the_segments_embedding_where_it_is(task):
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    own = label_map(YARD, 2, 32).one_hot()
    (found,) = task._maps(pixels, own[None], torch.Generator().manual_seed(0))
    wanted = scaled(embed(crop(pixels[0], own[1], 16)[None]))[0]
    share = F.interpolate(own[1][None, None], (16, 16), mode="area")[0, 0]
    torch.testing.assert_close(found, wanted[:, None, None] * share)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_preview_is_drawn_where_the_backbone_is(task, tmp_path):
    options = replace(task.options, pairs=4)
    own = SpatialTask(options, task.examples, tiny.sd_pipeline().to("cuda"), embed, 16)
    own.preview()
    own.export(tmp_path)


def test_a_crop_shows_the_segment_alone():
    pixels, mask = torch.full((3, 40, 40), 0.5), torch.zeros(40, 40)
    pixels[0], mask[4:14, 30:40] = torch.linspace(-1, 1, 40)[None], 1
    seen = crop(pixels, mask, 12)
    assert seen.shape == (3, 12, 12)
    assert float(seen[1, 3:9, 3:9].min()) > 0.49
    assert float(seen[1, 0].max()) < 0.2
    assert float(seen[0, 6, 8]) > float(seen[0, 6, 3]) > 0.5


def test_the_prior_is_ridge_regression_on_standardised_states():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(30, 5, generator=generator, dtype=torch.float64) * torch.arange(1, 6)
    embeddings = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    prior = fitted_prior(states, embeddings, 2.0)
    u = (states - states.mean(0)) / states.std(0, correction=0)
    known = Ridge(alpha=2.0).fit(u.numpy(), embeddings.numpy())
    wanted = torch.from_numpy(known.predict(u.numpy())).float()
    torch.testing.assert_close(prior.prior(states.float()), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_exported_draws_from_phrases_and_places(task, tmp_path):
    task.export(tmp_path)
    condition = Condition("a red circle", segments=(Segment("red circle", (0, 0, 0.5, 1)),))
    given = {"seeds": [0], "steps": 1}
    control = [Control(tmp_path / "control")]
    drawn = guidekit.sample(str(tmp_path), [condition], controls=control, **given)
    assert drawn.finish().images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"segments": 0}, "segments must be 1 or more, not 0"),
        ({"mapless": 2.0}, "mapless must be from 0 to 1, not 2"),
        ({"ridge": 0.0}, "ridge must be above 0, not 0"),
    ],
)
def test_impossible_options_are_said(options, words):
    with pytest.raises(GuidekitError, match=words):
        SpatialOptions(**options)


def test_labels_without_things_are_refused(tmp_path):
    shots = read_shots(write_shots(tmp_path, side=32))
    examples = ShotExamples(shots, GARDEN, 32, 1, flips=False)
    with pytest.raises(GuidekitError, match="'garden' names no things, whose segments are shown"):
        SpatialTask(SpatialOptions(), examples, tiny.sd_pipeline(), embed, 16)
