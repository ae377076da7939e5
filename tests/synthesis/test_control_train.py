"""The task `control`: folds, the loss of a control that does nothing, what is exported."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import guidekit
import tiny
from guidekit import Condition, Control, GuidekitError
from guidekit.affinity.shots import read_shots
from guidekit.backbones.control_images import control_pixels
from guidekit.backbones.controls import load_control
from guidekit.synthesis.control_train import (
    ControlOptions,
    ControlTask,
    folded_control,
    layers_of,
    make,
    new_control,
    warn_of_reconstruction,
)
from guidekit.synthesis.data import SOURCE_LABELS, ShotExamples, WorldExamples
from guidekit.testing.conditioners import control_net, map_encoder, t2i_adapter
from label_worlds import GARDEN, PARK, affinity, label_map, write_shots

HAND = {"lawn": "grass", "pond": "rock"}
FOUR = replace(PARK, classes=(*PARK.classes, "sand"))  # three channels are colours
COLOURED = replace(FOUR, palette=((255, 0, 0), (0, 90, 200), (9, 200, 30), (200, 200, 0)))
NETS = {
    "adapter": t2i_adapter,
    "controlnet": control_net,
    "encoder": lambda pipe, channels: map_encoder(pipe, channels),
}


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@pytest.fixture(scope="module")
def task(pipe, tmp_path_factory):
    """A ControlNet task on shots at the tiny pipeline's size."""
    shots = read_shots(write_shots(tmp_path_factory.mktemp("shots"), side=32))
    options = ControlOptions(kind="controlnet", source="shots", embedding=(16, 32))
    examples = ShotExamples(shots, GARDEN, 32, 1, flips=False)
    return ControlTask(options, examples, pipe, new_control(options, pipe, 2, 32))


def answer(net, maps, pipe):
    """Residuals of a control for maps (1, C, 32, 32), as one vector."""
    if net.config.get("downscale_factor"):
        return torch.cat([x.flatten() for x in net(maps)])
    if net.config.get("grid"):
        return net(maps).flatten()
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    states = torch.zeros(1, 5, pipe.unet.config.cross_attention_dim)
    downs, mid = net(z, 10, states, maps, return_dict=False)
    return torch.cat([x.flatten() for x in (*downs, mid)])


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("source", [FOUR, COLOURED], ids=["one-hot", "coloured"])
def test_a_folded_control_answers_as_to_the_remapped_map(kind, source, pipe):
    channels = 3 if source.palette else len(source)
    net, own = NETS[kind](pipe, channels=channels), affinity(HAND, source)
    given = label_map(GARDEN, side=32)
    shown = control_pixels(own.remap(given), channels, (32, 32))[None]
    folded = folded_control(net, own).eval()
    with torch.no_grad():
        wanted, found = answer(net, shown, pipe), answer(folded, given.one_hot()[None], pipe)
        other = answer(folded, given.one_hot().flip(0)[None], pipe)
    assert (found - wanted).norm() < 1e-5 * wanted.norm() < (other - wanted).norm()


def test_colours_in_another_order_and_of_three_classes_fold_too(pipe):
    net = control_net(pipe)
    weight = net.controlnet_cond_embedding.conv_in.weight
    three = replace(PARK, palette=COLOURED.palette[:3])
    folded = folded_control(net, affinity(HAND, three))
    wanted = torch.einsum("ochw,ct->othw", weight, three.colours[:, [0, 2]].float())
    torch.testing.assert_close(folded.controlnet_cond_embedding.conv_in.weight, wanted)
    net.register_to_config(controlnet_conditioning_channel_order="bgr")
    own, given = affinity(HAND, COLOURED), label_map(GARDEN, side=32)
    shown = control_pixels(own.remap(given), 3, (32, 32))[None]
    with torch.no_grad():
        wanted = answer(net, shown, pipe)
        found = answer(folded_control(net, own).eval(), given.one_hot()[None], pipe)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_file_that_leaves_its_channels_out_folds_too(pipe, tmp_path):
    """As files of diffusers' early versions do."""
    control_net(pipe).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["conditioning_channels"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    folded = folded_control(load_control(tmp_path), affinity(HAND, COLOURED))
    assert folded.config.conditioning_channels == 2


@pytest.mark.parametrize(
    ("kind", "factor", "size", "wanted"),
    [
        ("controlnet", 4, 64, (16, 32, 64)),
        ("controlnet", 8, 512, (16, 32, 64, 128)),
        ("encoder", 4, 64, (16, 32, 64)),
        ("encoder", 8, 512, (16, 32, 64, 128, 256, 256)),
    ],
)
def test_first_layers_follow_the_autoencoder_and_the_images(kind, factor, size, wanted):
    assert layers_of(ControlOptions(kind=kind), factor, size) == wanted


@pytest.mark.parametrize("kind", NETS)
def test_a_control_of_its_defaults_is_trained_at_another_size(kind, tmp_path):
    """Beside a backbone of another autoencoder than the built-in one's, with a preview."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "sd")
    shots = write_shots(tmp_path / "shots", side=64)
    given = {"kind": kind, "source": "shots", "data": str(shots), "held_out": 1}
    with pytest.warns(UserWarning, match="autoencoder gives these images back"):
        task = make(ControlOptions(**given, backbone=str(tmp_path / "sd")), tmp_path, 64)
    task.net(**task.batch(range(2), torch.Generator().manual_seed(0)))["mse"].backward()
    assert task.preview().height > 2 * 64  # images above what is drawn


def test_a_new_controlnet_has_the_backbones_own_loss(task, pipe):
    batch = task.batch(range(4), torch.Generator().manual_seed(0))
    assert batch["maps"].shape == (4, 2, 32, 32)
    assert batch["z"].shape == (4, 4, 16, 16)
    with torch.no_grad():
        out = pipe.unet(batch["z"], batch["timestep"], batch["states"]).sample
        assert task.net(**batch)["mse"] == F.mse_loss(out, batch["target"])
    task.net(**batch)["mse"].backward()
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert any(p.grad.abs().sum() > 0 for p in task.net.control.parameters() if p.grad is not None)
    assert task.held_out() == task.held_out() > 0


def encoder_task(pipe, folder, **options):
    """Training of an encoder on shots at the tiny pipeline's size."""
    shots = read_shots(write_shots(folder / "shots", side=32))
    given = {"kind": "encoder", "source": "shots", "embedding": (8, 8, 8)} | options
    options, examples = ControlOptions(**given), ShotExamples(shots, GARDEN, 32, 1, flips=False)
    return ControlTask(options, examples, pipe, new_control(options, pipe, 2, 32))


def test_an_encoder_trains_beside_a_frozen_backbone_then_both(tmp_path):
    pipe = tiny.sd_pipeline()
    task = encoder_task(pipe, tmp_path / "alone", null=1.0)
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    batch = task.batch(range(4), torch.Generator().manual_seed(0))
    assert not batch["maps"].any()
    with torch.no_grad():
        told = torch.cat([batch["states"], task.net.control(batch["maps"])], 1)
        assert told.shape[1] == batch["states"].shape[1] + 17
        out = pipe.unet(batch["z"], batch["timestep"], told).sample
        assert task.net(**batch)["mse"] == F.mse_loss(out, batch["target"])
    trained = {name.split(".")[0] for name, p in task.net.named_parameters() if p.requires_grad}
    assert trained == {"control"}

    both = encoder_task(pipe, tmp_path / "both", joint=True)
    both.net(**both.batch(range(4), torch.Generator().manual_seed(0)))["mse"].backward()
    moved = {n.split(".")[0] for n, p in both.net.named_parameters() if p.grad is not None}
    assert moved == {"control", "joined"}
    assert all(p.grad is None for p in pipe.text_encoder.parameters())
    both.export(tmp_path / "model")
    drawn = guidekit.sample(
        str(tmp_path / "model"),
        [Condition("a red circle", map=label_map(GARDEN, side=32))],
        seeds=[0],
        steps=1,
        controls=[Control(str(tmp_path / "model" / "control"))],
    )
    assert drawn.finish().images.shape == (1, 3, 32, 32)


def test_an_encoder_goes_on_from_one_of_the_same_classes(tmp_path):
    scenes = guidekit.load("scenes", "cpu")
    map_encoder(scenes, len(SOURCE_LABELS)).save_pretrained(tmp_path / "start")
    SOURCE_LABELS.save(tmp_path / "start" / "labels.json")
    given = {"kind": "encoder", "start": "start", "backbone": "scenes"}
    task = make(ControlOptions(**given), tmp_path, 64)
    wanted = load_control(tmp_path / "start").state_dict()
    assert all(torch.equal(wanted[k], v) for k, v in task.net.control.state_dict().items())
    PARK.save(tmp_path / "start" / "labels.json")
    with pytest.raises(GuidekitError, match="start is of other classes than 'scenes', or does not"):
        make(ControlOptions(**given), tmp_path, 64)


def test_an_exported_control_draws_from_a_map_and_names_its_classes(task, pipe, tmp_path):
    task.export(tmp_path)
    assert guidekit.load_label_set(tmp_path / "labels.json").classes == GARDEN.classes
    own = Condition("a red circle", map=label_map(GARDEN, side=32))
    done = guidekit.sample(pipe, [own], seeds=[0], steps=1, controls=[Control(str(tmp_path))])
    assert done.finish().images.shape == (1, 3, 32, 32)


def test_an_autoencoder_that_loses_the_images_is_said(recwarn):
    pipe = guidekit.load("scenes", "cpu")
    assert warn_of_reconstruction(pipe, WorldExamples("dense", 64).shown(4)[0]) > 28
    assert not [w for w in recwarn if "autoencoder" in str(w.message)]
    with pytest.warns(UserWarning, match="gives these images back with .* dB, so it cannot draw"):
        assert warn_of_reconstruction(pipe, WorldExamples("prints", 64).shown(4)[0]) < 24


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "spade"}, "kind must be adapter or controlnet or encoder, not 'spade'"),
        ({"affinity": "A"}, "an affinity is for the control that is named by `start`"),
        ({"joint": True}, "joint is for the kind encoder; a backbone beside the kind adapter is"),
        ({"null": 2.0}, "null must be from 0 to 1, not 2"),
        ({"backbone": "scenes-ddpm"}, "is a DDPMPipeline; controls are trained for Stable"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(options, words, tmp_path):
    with pytest.raises(GuidekitError, match=words):
        make(ControlOptions(**options), tmp_path, 32)


def test_a_start_of_another_kind_or_label_set_is_refused(pipe, tmp_path):
    t2i_adapter(pipe, channels=3).save_pretrained(tmp_path / "start")
    affinity(HAND).save(tmp_path / "A")
    shots = write_shots(tmp_path / "shots", side=32)
    given = {"source": "shots", "data": str(shots), "affinity": str(tmp_path / "A")}
    given["start"] = str(tmp_path / "start")
    with pytest.raises(GuidekitError, match="of the kind adapter, not controlnet; set kind"):
        make(ControlOptions(**given, kind="controlnet"), tmp_path, 32)
    three = write_shots(tmp_path / "three", PARK, side=32)
    with pytest.raises(GuidekitError, match="has 3 classes, and a control of 3 channels reads col"):
        make(ControlOptions(source="shots", data=str(three)), tmp_path, 32)
    GARDEN.save(tmp_path / "start" / "labels.json")
    with pytest.raises(GuidekitError, match="the model draws from 'garden' with 2 classes"):
        make(ControlOptions(**given), tmp_path, 32)
