"""The task `maps`: what it begins with, and which of its checkpoints is exported."""

import json

import pytest
import torch

from guidekit import GuidekitError, LabelSet
from guidekit.affinity.shots import read_shots
from guidekit.synthesis.data import ShotExamples, WorldExamples
from guidekit.synthesis.pipeline import MapsPipeline
from guidekit.synthesis.train import MapsOptions, MapsTask, make, transferred
from guidekit.train import Loop, Options
from label_worlds import GARDEN, PARK, affinity, label_map, maps_pipeline, write_shots

HAND = {"lawn": "grass", "pond": {"water": 3, "rock": 1}}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of a tiny model of PARK."""
    folder = tmp_path_factory.mktemp("start")
    maps_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return write_shots(tmp_path_factory.mktemp("shots"))


@pytest.mark.parametrize("soft", [False, True])
def test_the_fold_of_the_host_equals_the_remapped_map(soft):
    pipe, own = maps_pipeline().to(torch.float64), affinity(HAND)
    shown = torch.stack([label_map(GARDEN, i).one_hot().double() for i in range(2)])
    z, t = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([10, 700])
    matrix = own.soft() if soft else own.matrix()
    folded = transferred(pipe, GARDEN, matrix).double().eval()
    remapped = torch.einsum("st,bthw->bshw", matrix, shown)
    wanted = pipe.unet(torch.cat([z, remapped], 1), t).sample
    found = folded(torch.cat([z, shown], 1), t).sample
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    assert not torch.allclose(found, folded(torch.cat([z, shown.flip(1)], 1), t).sample, atol=1e-3)


def test_an_identity_is_the_source_model_bit_for_bit(start, tmp_path):
    renamed = LabelSet("meadow", ("green", "wet", "hard"))
    same = affinity(dict(zip(renamed.classes, PARK.classes, strict=True)), PARK, renamed)
    same.save(tmp_path / "A")
    shots = write_shots(tmp_path / "shots", renamed)
    options = MapsOptions(
        source="shots", data=str(shots), start=str(start), affinity=str(tmp_path / "A")
    )
    make(options, tmp_path, 16).export(tmp_path / "model")
    made = MapsPipeline.from_pretrained(tmp_path / "model").unet.state_dict()
    for name, weight in maps_pipeline().unet.state_dict().items():
        assert torch.equal(made[name].half(), weight.half()), name


def test_without_an_affinity_only_the_maps_filters_are_new():
    pipe = maps_pipeline()
    before, fresh = pipe.unet.state_dict(), transferred(pipe, GARDEN, None).state_dict()
    assert [n for n in before if before[n].shape != fresh[n].shape] == ["conv_in.weight"]
    assert torch.equal(fresh["conv_in.weight"][:, :3], before["conv_in.weight"][:, :3])
    assert all(torch.equal(before[n], fresh[n]) for n in before if n != "conv_in.weight")


def test_batches_hold_the_map_beside_the_pixels_and_drop_it_at_times(shots):
    examples = ShotExamples(read_shots(shots), GARDEN, 16, 1, flips=True)
    options = MapsOptions(channels=(16, 32), head=8, groups=8, null=0.5)
    batch = MapsTask(options, examples, 16).batch(range(64), torch.Generator().manual_seed(0))
    assert batch["z"].shape == (64, 5, 16, 16)
    sums = batch["z"][:, 3:].sum(1)
    kept = (sums == 1).all((1, 2))
    assert (kept | (sums == 0).all((1, 2))).all()
    assert 20 < kept.sum() < 44
    known = examples.pixels[examples.trained]
    pixels, _ = examples.pairs(range(32), torch.Generator().manual_seed(0))
    either = [any(torch.equal(x, y) for y in [*known, *known.flip(-1)]) for x in pixels]
    assert all(either)
    assert len(examples.kept) == 1


def test_worlds_have_a_class_for_every_pixel():
    examples = WorldExamples("prints", 32)
    pixels, maps = examples.pairs(range(2), torch.Generator())
    assert pixels.shape == (2, 3, 32, 32)
    assert maps.shape == (2, 68, 32, 32)
    assert (maps.sum(1) == 1).all()


def test_the_weights_with_the_lowest_loss_on_held_out_shots_are_exported(start, shots, tmp_path):
    matrix = affinity(HAND).matrix()
    examples = ShotExamples(read_shots(shots), GARDEN, 16, 1, flips=False)
    options = MapsOptions(source="shots")
    task = MapsTask(options, examples, 16, MapsPipeline.from_pretrained(start), matrix)
    task.net.train()
    for part in task.net.unet.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    first = task.held_out()
    assert task.held_out() == first
    assert task.net.unet.mid_block.training
    # A rate at which every step makes it worse: what it began with is the best.
    loop = Options(steps=2, batch=2, lr=1.0, warmup=0, ema=0.0, save_every=1, decay="constant")
    running = Loop(task, loop, tmp_path, quiet=True)
    running.run()
    assert task.held_out() > first
    running.export(tmp_path / "model")
    facts = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert facts["step"] == 2
    made = MapsPipeline.from_pretrained(tmp_path / "model").unet.state_dict()
    wanted = transferred(maps_pipeline(), GARDEN, matrix).state_dict()
    assert all(torch.equal(made[n].half(), wanted[n].half()) for n in wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"held_out": 3}, "3 of 3 shots held out leaves none to train on"),
        ({"data": ""}, "trains on shots; name their folder by `data`"),
        ({"source": "nowhere"}, "source must be dense, prints, shots, not 'nowhere'"),
        ({"start": "scenes-ddpm"}, "scenes-ddpm is a DDPMPipeline, which reads no label maps"),
        ({"start": "", "affinity": "A"}, "an affinity is for the model that is named by `start`"),
        ({"null": 2.0}, "null must be from 0 to 1"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(change, words, start, shots, tmp_path):
    given = {"source": "shots", "data": str(shots), "start": str(start)} | change
    with pytest.raises(GuidekitError, match=words) as caught:
        make(MapsOptions(**given), tmp_path, 16)
    assert "\n" not in str(caught.value)


def test_an_affinity_of_another_label_set_is_refused(start, shots, tmp_path):
    other = LabelSet("town", ("road", "house"))
    affinity({"road": "rock", "house": "rock"}, PARK, other).save(tmp_path / "A")
    given = {"source": "shots", "data": str(shots), "start": str(start)}
    with pytest.raises(GuidekitError, match="from 'town' to 'park', and the shots are of 'garden'"):
        make(MapsOptions(**given, affinity=str(tmp_path / "A")), tmp_path, 16)
    with pytest.raises(GuidekitError, match="draws images of 16x16; give its recipe that size"):
        make(MapsOptions(**given), tmp_path, 32)


@pytest.mark.full
def test_a_training_that_goes_on_keeps_the_same_weights(start, shots, tmp_path):
    kept = []
    for several in ((4,), (2, 4)):
        folder = tmp_path / str(len(several))
        for steps in several:
            examples = ShotExamples(read_shots(shots), GARDEN, 16, 1, flips=True)
            matrix = affinity(HAND).matrix()
            begun = MapsPipeline.from_pretrained(start)
            task = MapsTask(MapsOptions(source="shots"), examples, 16, begun, matrix)
            own = {"steps": steps, "batch": 2, "lr": 1e-3, "warmup": 0, "decay": "constant"}
            Loop(task, Options(**own, ema=0.5, save_every=1), folder, quiet=True).run()
        kept.append((folder / "best.safetensors").read_bytes())
    assert kept[0] == kept[1]
