"""Heads: features, linear heads, fitting, fingerprints, files that refuse strangers."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from guidekit import Denoiser
from guidekit.errors import GuidekitError
from guidekit.heads import Examples, FitOptions, Reading, fit, load_head
from guidekit.heads.features import (
    collect,
    fixed_noise,
    noised,
    observe,
    pooled,
    read_features,
    resolve_sites,
)
from guidekit.heads.fingerprint import fingerprint, same_backbone
from guidekit.heads.head import Head, HeadConfig
from guidekit.heads.linear import fit_linear, log_loss
from guidekit.heads.pixels import varied
from guidekit.testing.miniatures import ddpm_pipeline, sd_pipeline


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser(ddpm_pipeline())


def bright_and_dark(count=12, side=16):
    """Images of two classes that differ in their left half, and which half is bright."""
    generator = torch.Generator().manual_seed(0)
    pictures = 0.3 * torch.randn(count, 3, side, side, generator=generator)
    targets = torch.arange(count) % 2
    for i, target in enumerate(targets):
        half = slice(0, side // 2) if target else slice(side // 2, side)
        pictures[i, :, :, half] += 0.7
    return pictures.clamp(-1, 1), targets


def halves(count=8, side=16):
    """Images whose left part is bright up to some column, and that part as a mask."""
    generator = torch.Generator().manual_seed(1)
    pictures = 0.2 * torch.randn(count, 3, side, side, generator=generator) - 0.4
    masks = torch.zeros(count, side, side, dtype=torch.long)
    for i in range(count):
        edge = 4 + i % 8
        pictures[i, :, :, :edge] += 0.8
        masks[i, :, :edge] = 1
    return pictures.clamp(-1, 1), masks


# Features


def test_features_are_those_of_a_whole_call(denoiser):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sites = ("down_blocks.0", "mid_block", "up_blocks.1.resnets.0")
    kept = {}
    hooks = [
        denoiser.model.get_submodule(s).register_forward_hook(
            lambda m, a, out, s=s: kept.__setitem__(s, out[0] if isinstance(out, tuple) else out)
        )
        for s in sites
    ]
    denoiser.model(x, 300)
    for hook in hooks:
        hook.remove()
    found = read_features(denoiser, x, 300, sites)
    assert all(torch.equal(found[s], kept[s]) for s in sites)


def test_noise_is_the_schedulers(denoiser):
    x, eps = torch.randn(2, 3, 16, 16), fixed_noise([0, 1], (3, 16, 16))
    expected = denoiser.pipeline.scheduler.add_noise(x, eps, torch.tensor([250, 250]))
    torch.testing.assert_close(noised(denoiser, x, 250, eps), expected)


def test_the_cache_streams_and_is_used_again(denoiser, tmp_path):
    pictures, _ = bright_and_dark(5)
    reading, asked = Reading(("mid_block",), (500,), pool=2), []

    def load(index):
        asked.append(list(index))
        return pictures[list(index)]

    first = collect(denoiser, load, 5, reading, tmp_path, "key", batch=2)
    assert asked == [[0, 1], [2, 3], [4]]
    again = collect(denoiser, load, 5, reading, tmp_path, "key", batch=2)
    assert len(asked) == 3
    assert np.array_equal(first["500.mid_block"], again["500.mid_block"])
    (maps,) = observe(denoiser, pictures, reading)
    expected = pooled(maps, ["mid_block"], 2).detach().numpy()
    np.testing.assert_allclose(first["500.mid_block"], expected, rtol=1e-4, atol=1e-5)
    assert isinstance(first["500.mid_block"], np.memmap)


def test_sites_that_match_nothing_are_refused(denoiser):
    with pytest.raises(GuidekitError, match="nowhere"):
        resolve_sites(denoiser, ["nowhere"], "classes")


# Linear heads


def test_ridge_solves_the_normal_equations():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), np.arange(40) % 2
    x[:, 0] += 2 * y
    found = fit_linear(x, y, 2, "ridge")
    z = (x - found.mean) / found.std
    target = 4 * (2.0 * (y[:, None] == np.arange(2)) - 1)
    centred = z - z.mean(0)
    gram = centred.T @ centred + found.strength * np.eye(6)
    np.testing.assert_allclose(found.weight, np.linalg.solve(gram, centred.T @ target).T)


def test_strength_and_temperature_are_cross_validated():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 30))
    x[:, :3] += 2.5 * np.eye(3)[y]
    found = fit_linear(x, y, 3)
    test = rng.normal(size=(600, 30))
    labels = np.arange(600) % 3
    test[:, :3] += 2.5 * np.eye(3)[labels]
    logits = found.logits(test)
    assert (logits.argmax(1) == labels).mean() > 0.75
    calibrated = log_loss(logits, labels)
    assert calibrated < log_loss(4 * logits, labels)
    assert calibrated < log_loss(logits / 4, labels)
    assert found.scores["folds"] == 5


def test_rows_of_a_fold_that_is_left_out_are_not_scored():
    """Class 2 is in one image alone, so that image cannot be held out."""
    rng = np.random.default_rng(0)
    groups, y = np.repeat(np.arange(5), 100), np.zeros(500, int)
    y[::2] = 1
    y[groups == 0] = 2
    x = rng.normal(size=(500, 4))
    x[:, 0] += 6 * (y == 1)
    x[:, 1] += 6 * (y == 2)
    found = fit_linear(x, y, 3, groups=groups)
    assert found.scores["folds"] == 4
    assert found.scores["rows"] == 400
    assert found.scores["accuracy"] > 0.99
    assert found.scores["log_loss"] < 0.05


def test_one_example_of_a_class_has_the_defaults():
    x = np.random.default_rng(0).normal(size=(3, 8))
    found = fit_linear(x, np.arange(3), 3)
    assert found.scores == {}
    assert found.temperature == 1
    assert found.strength == 0.01
    assert (found.logits(x).argmax(1) == np.arange(3)).all()


def test_rare_classes_weigh_as_much_as_frequent_ones():
    rng = np.random.default_rng(0)
    y = np.array([0] * 90 + [1] * 10)
    x = rng.normal(size=(100, 2)) + 1.2 * y[:, None]
    logits = fit_linear(x, y, 2).logits(x)
    assert (
        abs((logits.argmax(1) == 1)[y == 1].mean() - (logits.argmax(1) == 0)[y == 0].mean()) < 0.3
    )


# Fitting and files


def test_classes_are_learned_and_saved(denoiser, tmp_path):
    pictures, targets = bright_and_dark()
    head, report = fit(denoiser, Examples.of(pictures, targets, ["right", "left"]))
    assert report.scores["accuracy"] > 0.9
    assert report.notes == []
    assert (head.predict(denoiser, pictures).argmax(1) == targets).all()
    again = load_head(head.save(tmp_path / "head"), denoiser)
    assert again.config == head.config
    assert torch.equal(again.predict(denoiser, pictures), head.predict(denoiser, pictures))
    alone = again.predict(denoiser, pictures[3:4])
    torch.testing.assert_close(alone, head.predict(denoiser, pictures)[3:4], atol=1e-4, rtol=1e-4)


def test_noised_features_have_a_readout_for_each_timestep(denoiser):
    pictures, targets = bright_and_dark()
    options = FitOptions(noised=True, timesteps=(100, 300))
    head, _ = fit(denoiser, Examples.of(pictures, targets, ["right", "left"]), options)
    assert len(head.readouts) == 2
    maps = read_features(denoiser, pictures, 290, head.config.reading.sites)
    expected = head.readouts[1](head.assembled([maps]))[..., 0, 0]
    assert torch.equal(head.at_timestep(maps, 290), expected)


def test_several_labels_are_learned(denoiser):
    pictures, targets = bright_and_dark(16)
    other = torch.arange(16) // 2 % 2
    pictures[other == 1, 0] -= 0.8
    both = torch.stack([targets, other], 1).numpy()
    head, report = fit(denoiser, Examples.of(pictures, both, ["left", "less red"], "labels"))
    assert ((head.predict(denoiser, pictures) > 0).numpy() == both).mean() > 0.9
    assert report.scores["folds"] == 5
    both[:, 1] = 1
    with pytest.raises(GuidekitError, match="'less red' is on every image"):
        fit(denoiser, Examples.of(pictures, both, ["left", "less red"], "labels"))


@pytest.mark.parametrize("estimator", ["mlp", "linear"])
def test_masks_are_learned(denoiser, estimator):
    pictures, masks = halves()
    examples = Examples.of(pictures, masks, ["dark", "bright"], "masks")
    options = FitOptions(estimator=estimator, epochs=30, copies=2)
    head, report = fit(denoiser, examples, options)
    found = head.predict(denoiser, pictures)
    assert found.shape == (8, 2, 16, 16)
    assert (found.argmax(1) == masks).float().mean() > 0.85
    assert (head.config.hidden == (64, 64, 64)) == (estimator == "mlp")
    assert max(report.scores.get("held_out_miou", 0), report.scores.get("accuracy", 0)) > 0.6


def test_variants_keep_picture_and_mask_together():
    pictures, masks = halves(1)
    same, mask = varied(pictures[0], masks[0], 0)
    assert torch.equal(same, pictures[0])
    assert torch.equal(mask, masks[0])
    flipped, mask = varied(pictures[0], masks[0], 1)
    assert torch.equal(mask, masks[0].flip(-1))
    assert float(flipped[:, mask == 1].mean()) > float(flipped[:, mask == 0].mean())


def test_auto_chooses_and_shows_what_it_tried(denoiser):
    pictures, targets = bright_and_dark()
    options = FitOptions(auto=True, sites=("down_blocks.0", "mid_block"), timesteps=(100,), pool=2)
    _, report = fit(denoiser, Examples.of(pictures, targets, ["right", "left"]), options)
    assert len(report.candidates) == 3  # each site, and both
    assert report.reading == report.candidates[0].reading
    losses = [c.log_loss for c in report.candidates]
    assert losses == sorted(losses)


def test_one_example_per_class_says_so(denoiser):
    pictures, targets = bright_and_dark(2)
    examples = Examples.of(pictures, targets, ["right", "left"])
    _, report = fit(denoiser, examples)
    assert "one example only" in report.notes[0]
    assert report.scores == {}
    with pytest.raises(GuidekitError, match="--auto needs two"):
        fit(denoiser, examples, FitOptions(auto=True))


def small_head(denoiser):
    pictures, targets = bright_and_dark(4)
    return fit(denoiser, Examples.of(pictures, targets, ["right", "left"]))[0]


def test_a_head_refuses_another_backbone_but_not_another_precision(denoiser, tmp_path):
    folder = small_head(denoiser).save(tmp_path)
    load_head(folder, Denoiser(ddpm_pipeline().to(torch.float16)))
    with pytest.raises(GuidekitError, match="another backbone"):
        load_head(folder, Denoiser(sd_pipeline()))
    other = ddpm_pipeline()
    for weight in other.unet.parameters():
        weight.data += 0.05
    with pytest.raises(GuidekitError, match="other weights"):
        load_head(folder, Denoiser(other))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fingerprint_sees_all_weights_and_no_rounding(dtype):
    pipe = ddpm_pipeline()
    own, model = fingerprint(Denoiser(pipe)), pipe.unet
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    halved = fingerprint(Denoiser(ddpm_pipeline().to(dtype)))
    assert same_backbone(own, halved)
    assert own["dtype"] != halved["dtype"]
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += torch.randn_like(weight) * 1e-3
    assert not same_backbone(fingerprint(Denoiser(pipe)), halved)
    for name in whole:  # each of them alone
        model.load_state_dict(whole)
        dict(model.named_parameters())[name].data.mul_(1.05).add_(0.01)
        assert not same_backbone(fingerprint(Denoiser(pipe)), halved), name
    model.load_state_dict(whole)
    pipe.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    other = fingerprint(Denoiser(pipe))
    assert same_backbone(own, other)
    assert not same_backbone(own, other, levels=True)
    for numbers in (None, [], "x", [[0.0]], own["sums"][1:], ["a"] * len(own["sums"])):
        assert not same_backbone(own, own | {"sums": numbers})


def test_the_fingerprint_of_a_model_that_reads_text_has_its_encoder():
    pipe = sd_pipeline()
    own = fingerprint(Denoiser(pipe))
    for weight in pipe.text_encoder.parameters():
        weight.data += 0.05
    assert not same_backbone(own, fingerprint(Denoiser(pipe)))


def test_a_head_refuses_other_sites_and_damage(denoiser, tmp_path):
    head = small_head(denoiser)
    reading = dataclasses.replace(head.config.reading, sites=("nowhere",))
    other = Head(dataclasses.replace(head.config, reading=reading))
    with pytest.raises(GuidekitError, match="nowhere"):
        load_head(other.save(tmp_path / "sites"), denoiser)
    with pytest.raises(GuidekitError, match="is no head"):
        load_head(tmp_path / "none", denoiser)
    folder = head.save(tmp_path / "cut")
    (folder / "head.safetensors").write_bytes(b"short")
    with pytest.raises(GuidekitError, match="damaged"):
        load_head(folder, denoiser)
    assert set(load_file(tmp_path / "sites" / "head.safetensors")) == set(head.state_dict())


@pytest.mark.parametrize("kind", ["picture", ""])
def test_a_head_of_an_unknown_kind_is_refused(kind):
    with pytest.raises(GuidekitError, match="no kind of head"):
        Head(HeadConfig(kind, ("a",), Reading(("mid_block",), (5,)), 4))
