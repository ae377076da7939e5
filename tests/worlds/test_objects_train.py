"""The trainers draw scenes of any folder of cut-outs, resume, and end in a pipeline that draws."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from guidekit.__main__ import main
from guidekit.errors import GuidekitError
from guidekit.train import latents
from guidekit.train.judge import Judge
from guidekit.train.muon import Muon, orthogonal
from guidekit.train.options import Options, lr_at
from guidekit.train.recipe import train

RECIPE = """
model = "tiny"
size = 64
[[stage]]
task = "vae"
source = "cutouts"
channels = [8, 8, 8, 16]
crop = 32
whole = 2
on_things = true
edges = 0.5
shrunk = 0.25
logvar = -6.0
steps = 4
batch = 2
optimizer = "muon"
decay = "constant"
save_every = 2
log_every = 1
[[stage]]
task = "text"
source = "cutouts"
width = 16
layers = 1
heads = 2
steps = 2
batch = 4
[[stage]]
task = "denoiser"
source = "cutouts"
channels = [16, 32]
heads = [1, 2]
pool = 8
train_text = false
beta_end = 0.016
spacing = "trailing"
gamma = 5.0
steps = 2
batch = 4
optimizer = "muon"
"""


@pytest.fixture
def cutouts(tmp_path):
    """Two cut-outs and the table of their names."""
    folder = tmp_path / "cutouts"
    folder.mkdir()
    for name, colour in (("a", (230, 40, 40, 255)), ("b", (40, 40, 230, 255))):
        image = Image.new("RGBA", (32, 32))
        ImageDraw.Draw(image).ellipse((2, 2, 29, 29), fill=colour)
        image.save(folder / f"{name}.png")
    (folder / "things.toml").write_text('[things]\na = "red ball"\nb = "blue ball"\n')
    return folder


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def test_recipe_ends_in_a_pipeline_and_starts_again_from_kept_latents(
    recipe, cutouts, tmp_path, monkeypatch
):
    model = train(recipe, tmp_path / "runs", quiet=True, cutouts=cutouts)
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    images = pipeline("a red ball on sand", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    encoder = load_file(tmp_path / "runs/tiny/text/model/text_encoder/model.safetensors")
    frozen = pipeline.text_encoder.state_dict()
    assert all(torch.allclose(frozen[k], v, atol=2e-3) for k, v in encoder.items() if k in frozen)
    # Once more: the latents are read, not encoded.
    model.rename(model.with_name("first"))
    monkeypatch.setattr(latents, "encode", None)
    train(
        recipe,
        tmp_path / "runs",
        quiet=True,
        overrides={"steps": 3, "changed": "allow"},
        cutouts=cutouts,
    )


def test_killed_training_with_muon_continues_exactly(recipe, cutouts, tmp_path):
    recipe.write_text(RECIPE[: RECIPE.index('[[stage]]\ntask = "text"')])
    train(recipe, tmp_path / "whole", quiet=True, cutouts=cutouts)
    train(recipe, tmp_path / "parts", quiet=True, overrides={"steps": 2}, cutouts=cutouts)
    (tmp_path / "parts/tiny/vae/model").rename(tmp_path / "first")
    train(recipe, tmp_path / "parts", quiet=True, overrides={"changed": "allow"}, cutouts=cutouts)
    whole, parts = (
        load_file(tmp_path / run / "tiny/vae/checkpoint.safetensors") for run in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert any("momentum" in key for key in whole)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_judge_of_cutouts(recipe, cutouts, tmp_path):
    recipe.write_text(
        'model = "judge"\nsize = 64\n[[stage]]\ntask = "judge"\nsource = "cutouts"\n'
        "width = 8\nsteps = 1\nbatch = 2\n"
    )
    line = ["train", str(recipe), "--out", str(tmp_path), "--cutouts", str(cutouts), "--json"]
    result = CliRunner().invoke(main, line, catch_exceptions=False)
    model = json.loads(result.stdout.splitlines()[-1])["model"]
    judge = Judge.from_pretrained(model, dtype=torch.float32)
    assert judge(torch.zeros(1, 3, 64, 64))[0].shape == (1, 3, 64, 64)


def test_without_a_folder_it_says_how_to_get_one(recipe, tmp_path):
    with pytest.raises(GuidekitError, match="--cutouts FOLDER.*npm pack"):
        train(recipe, tmp_path / "runs", quiet=True)


def test_unknown_source_names_those_that_exist(recipe, tmp_path):
    recipe.write_text(RECIPE.replace('"cutouts"', '"photos"'))
    with pytest.raises(GuidekitError, match="source must be scenes or dense or prints or cutouts"):
        train(recipe, tmp_path / "runs", quiet=True)


def test_cooldown_ends_a_constant_rate():
    options = Options(steps=100, lr=1.0, decay="constant", warmup=1, cooldown=20)
    rates = [lr_at(i, options) for i in range(100)]
    assert rates[:81] == [pytest.approx(1.0)] * 81
    assert all(a > b for a, b in itertools.pairwise(rates[80:]))
    assert rates[-1] == pytest.approx(0.01 + 0.99 / 20)


@pytest.mark.parametrize("shape", [(8, 8), (16, 90), (90, 16), (96, 864)])
def test_orthogonal_flattens_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix).float())
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_moves_matrices_by_adams_size_and_leaves_embeddings_to_adam():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 32))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = Muon(net, lr=0.01)
    net(torch.arange(5)).square().mean().backward()
    optimizer.step()
    moves = [  # per unit of the rate
        (p - b).square().mean().sqrt().item() / 0.01
        for p, b in zip(net.parameters(), before, strict=True)
    ]
    assert 0.1 < moves[1] < 0.4  # the linear weight: 0.2 where all singular values are one
    assert moves[0] == pytest.approx(1, abs=0.05)
    assert moves[2] == pytest.approx(1, abs=0.05)
