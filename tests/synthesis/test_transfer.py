"""`guidekit transfer`: the recipe that it writes and runs, the model of no steps, refusals."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from PIL import Image

import tiny
from guidekit import LabelSet
from guidekit.__main__ import main
from guidekit.backbones.controls import load_control
from guidekit.images import save_image
from guidekit.synthesis.pipeline import MapsPipeline
from guidekit.synthesis.train import transferred
from guidekit.synthesis.transfer import Transfer
from guidekit.testing.conditioners import control_net, t2i_adapter
from guidekit.train.recipe import read_recipe
from label_worlds import GARDEN, PARK, affinity, label_map, maps_pipeline, write_shots

HAND = {"lawn": "grass", "pond": "water"}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with the model `start`, `shots` and the affinity `A`."""
    folder = tmp_path_factory.mktemp("there")
    maps_pipeline().save_pretrained(folder / "start")
    write_shots(folder / "shots", count=4)
    affinity(HAND).save(folder / "A")
    return folder


def command(there, out, *more):
    """The result of `guidekit transfer` on what is there."""
    words = ["transfer", str(there / "shots"), "--model", str(there / "start"), "--json"]
    return CliRunner().invoke(main, [*words, "--out", str(out), *map(str, more)])


def test_no_steps_fold_the_affinity_and_the_model_draws(there, tmp_path):
    done = command(there, tmp_path / "mine", "--affinity", there / "A", "--steps", 0)
    assert done.exit_code == 0, done.output
    model = json.loads(done.stdout)["model"]
    made = MapsPipeline.from_pretrained(model)
    assert made.labels.classes == GARDEN.classes
    wanted = transferred(maps_pipeline(), GARDEN, affinity(HAND).matrix()).conv_in.weight
    assert (made.unet.conv_in.weight == wanted.half()).all()
    save_image(label_map(GARDEN).indexed(), tmp_path / "map.png")
    words = ["sample", "--model", model, "--map", tmp_path / "map.png", "--seeds", "0"]
    words += ["--steps", "2", "--out", tmp_path / "drawn", "--json"]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "drawn" / "0.png").size == (16, 16)
    again = ["sample", "--config", tmp_path / "drawn" / "run.json", "--out", tmp_path / "again"]
    assert CliRunner().invoke(main, list(map(str, again))).exit_code == 0
    same = [(tmp_path / name / "0.png").read_bytes() for name in ("drawn", "again")]
    assert same[0] == same[1]


def test_no_steps_fold_the_affinity_that_is_there_now(there, tmp_path):
    affinity(HAND).save(tmp_path / "A")
    more = ("--affinity", tmp_path / "A", "--steps", 0)
    assert command(there, tmp_path / "mine", *more).exit_code == 0
    other = affinity({"lawn": "rock", "pond": "rock"})
    other.save(tmp_path / "A")
    done = command(there, tmp_path / "mine", *more)
    assert done.exit_code == 0, done.output
    made = MapsPipeline.from_pretrained(json.loads(done.stdout)["model"])
    wanted = transferred(maps_pipeline(), GARDEN, other.matrix()).conv_in.weight
    assert (made.unet.conv_in.weight == wanted.half()).all()


def test_it_writes_a_recipe_runs_it_and_goes_on(there, tmp_path, monkeypatch):
    tables, table = [], Transfer.table  # which reads shots and controls
    monkeypatch.setattr(Transfer, "table", lambda plan: (tables.append(None), table(plan))[1])
    out, few = tmp_path / "mine", ("--steps", 2, "--batch", 2, "--affinity", there / "A")
    done = command(there, out, *few)
    assert done.exit_code == 0, done.output
    assert tables == [None]
    stage = read_recipe(out / "recipe.toml").stages[0]
    assert (stage.task, stage.loop.steps, stage.options.held_out) == ("maps", 2, 1)
    assert stage.loop.lr == 1e-3
    assert json.loads(done.stdout)["model"] == str(out / "maps" / "model")
    before = (out / "maps" / "model" / "model_index.json").stat().st_mtime_ns
    assert command(there, out, *few).exit_code == 0
    assert (out / "maps" / "model" / "model_index.json").stat().st_mtime_ns == before
    other = command(there, out, *few[:-2])
    assert other.exit_code == 2
    assert "holds another transfer; choose another --out" in other.output


@pytest.mark.full
def test_a_control_is_transferred_beside_its_backbone(there, tmp_path):
    """One in the colours of a palette, with the autoencoder's warning."""
    pipe = tiny.sd_pipeline()
    pipe.save_pretrained(tmp_path / "sd")
    t2i_adapter(pipe).save_pretrained(tmp_path / "seg")
    colours = ((9, 9, 9), (255, 0, 0), (0, 90, 0), (9, 0, 9))
    park = replace(PARK, classes=(*PARK.classes, "sand"), palette=colours)
    affinity(HAND, park).save(tmp_path / "A")
    more = ("--control", tmp_path / "seg", "--model", tmp_path / "sd", "--affinity", tmp_path / "A")
    done = command(there, tmp_path / "mine", *more, "--steps", 1, "--batch", 2)
    assert done.exit_code == 0, done.output
    assert "warning: the backbone's autoencoder gives these images back" in done.stderr
    assert read_recipe(tmp_path / "mine" / "recipe.toml").stages[0].loop.lr == 3e-4
    model = json.loads(done.stdout)["model"]
    assert load_control(model).config.in_channels == 2
    save_image(label_map(GARDEN, side=32).indexed(), tmp_path / "map.png")
    words = ["sample", "--model", tmp_path / "sd", "--prompt", "a red circle", "--steps", "1"]
    words += ["--control", model, "--map", tmp_path / "map.png", "--seeds", "0"]
    words += ["--out", tmp_path / "drawn"]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--affinity", "town"), "the shots are of 'garden' with 2 classes"),
        (("--model", "scenes-ddpm"), "scenes-ddpm is a DDPMPipeline, which reads no label maps"),
        (("--affinity", "shots"), "is no affinity (affinity.json"),
        (("--model", "scenes-map-adapter"), "run guidekit train scenes-map-adapter, and give"),
        (("--held-out", 4), "4 of 4 shots held out leaves none to train on"),
        (("--affinity", "A", "--by", "dreams"), "no estimate 'dreams'"),
        (("--control", "start"), "a control needs a hard affinity"),
        (("--lr", "nan"), "lr must be 0 or more, not nan"),
    ],
)
def test_what_cannot_be_transferred_leaves_nothing_behind(more, words, there, tmp_path):
    town = LabelSet("town", ("road", "house"))
    if not (there / "town").exists():
        affinity({"road": "rock", "house": "rock"}, PARK, town).save(there / "town")
    more = [there / word if str(word) in ("town", "shots", "A") else word for word in more]
    done = command(there, tmp_path / "mine", "--steps", 2, *more)
    assert done.exit_code == 2
    assert words in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("make", [control_net, t2i_adapter])
def test_a_control_of_another_family_leaves_nothing_behind(make, there, tmp_path):
    tiny.sd_pipeline().save_pretrained(tmp_path / "sd")
    make(tiny.sdxl_pipeline()).save_pretrained(tmp_path / "xl")
    affinity(HAND, replace(PARK, palette=((9, 9, 9), (255, 0, 0), (0, 90, 0)))).save(tmp_path / "A")
    more = ("--control", tmp_path / "xl", "--model", tmp_path / "sd", "--affinity", tmp_path / "A")
    done = command(there, tmp_path / "mine", *more)
    assert done.exit_code == 2, done.output
    assert "for another model: its" in done.output
    assert not (tmp_path / "mine").exists()
