"""Trainers: recipes are checked, a killed run continues exactly, finished models load."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from guidekit import Condition, Sampling, load
from guidekit.errors import GuidekitError
from guidekit.system import progress
from guidekit.system.locks import held
from guidekit.train.batches import batches
from guidekit.train.digits import DigitJudge
from guidekit.train.loop import Options, lr_at
from guidekit.train.pixels import jitter
from guidekit.train.recipe import TASKS, read_recipe, recipes, train
from guidekit.train.text import TextOptions, train_tokenizer, varied_caption
from guidekit.worlds import digits, scenes

RECIPE = """
model = "small"
size = 32
[[stage]]
task = "vae"
channels = [8, 16, 16]
crop = 16
steps = 6
batch = 4
save_every = 2
log_every = 1
[[stage]]
task = "text"
width = 16
layers = 1
heads = 2
steps = 2
batch = 4
[[stage]]
task = "denoiser"
channels = [16, 32]
heads = [1, 2]
pool = 16
steps = 3
batch = 4
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def test_recipe_ends_in_a_pipeline_that_draws(recipe, tmp_path):
    model = train(recipe, tmp_path, quiet=True)
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 32, 32)
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    assert not any(str(tmp_path) in path.read_text() for path in model.rglob("*.json"))


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from guidekit.train import loop
from guidekit.train.recipe import train
step = loop.Loop._train_step
def dying(self):
    if self.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
loop.Loop._train_step = dying
train(sys.argv[1], sys.argv[2], quiet=True)
"""


def test_killed_run_continues_exactly(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(RECIPE[: RECIPE.index('[[stage]]\ntask = "text"')])
    whole = train(path, tmp_path / "whole", quiet=True)
    script = textwrap.dedent(KILLED)
    args = [sys.executable, "-c", script, str(path), str(tmp_path / "cut")]
    assert subprocess.run(args, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "cut/small/vae/model").exists()
    again = train(path, tmp_path / "cut", quiet=True)
    name = "diffusion_pytorch_model.safetensors"
    first, second = load_file(whole / name), load_file(again / name)
    assert all(torch.equal(first[k], second[k]) for k in first)
    rows = [
        [json.loads(row) for row in (folder / "small/vae/metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert [r["step"] for r in rows[1]] == [1, 2, 3, 4, 5, 6]
    assert [r["mse"] for r in rows[0]] == [r["mse"] for r in rows[1]]


@dataclass
class Told:
    """A task whose batches say what they were made from, and where."""

    encodes: bool = False

    def batch(self, numbers, generator):
        noise = torch.rand(2, generator=generator)
        return {"numbers": torch.tensor(numbers), "noise": noise, "pid": torch.tensor(os.getpid())}


def test_batches_are_the_same_from_workers_which_leave_ctrl_c_alone():
    place, turns = Accelerator(), range(3, 9)
    alone = list(batches(Told(), 4, 1, place, turns, workers=0))
    assert [b["numbers"].tolist()[0] for b in alone] == [4 * turn for turn in turns]
    assert {int(b["pid"]) for b in alone} == {os.getpid()}
    helped = []
    for batch in batches(Told(), 4, 1, place, turns, workers=2):
        helped.append(batch)
        if len(helped) < 3:
            os.kill(int(batch["pid"]), signal.SIGINT)
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(one[k], other[k]) for k in ("numbers", "noise"))
    pids = {int(b["pid"]) for b in helped}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_workers_are_refused_where_batches_need_a_network():
    with pytest.raises(GuidekitError, match="it takes workers = 0"):
        batches(Told(encodes=True), 4, 1, Accelerator(), range(2), workers=1)


def test_workers_are_refused_where_processes_cannot_fork(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(GuidekitError, match="take workers = 0"):
        batches(Told(), 4, 1, Accelerator(), range(2), workers=1)
    assert len(list(batches(Told(), 4, 1, Accelerator(), range(0), workers=1))) == 0


def test_workers_change_no_weight(tmp_path):
    path = tmp_path / "small.toml"
    text = RECIPE[: RECIPE.index('[[stage]]\ntask = "text"')]
    models = []
    for workers in (0, 2):
        path.write_text(text + f"workers = {workers}\n")
        models.append(train(path, tmp_path / str(workers), quiet=True))
        assert not multiprocessing.active_children()
    name = "diffusion_pytorch_model.safetensors"
    first, second = (load_file(model / name) for model in models)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.filterwarnings("ignore:this CPU computes bf16")
def test_stages_have_precisions_of_their_own(recipe, tmp_path):
    recipe.write_text(RECIPE.replace("width = 16", 'width = 16\nprecision = "bf16"'))
    assert (train(recipe, tmp_path, quiet=True) / "model_index.json").exists()


def test_slow_bf16_is_told(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    recipe.write_text(RECIPE[: RECIPE.index('[[stage]]\ntask = "text"')])
    with pytest.warns(UserWarning, match="train with --set precision=no"):
        train(recipe, tmp_path, quiet=True, overrides={"precision": "bf16"})


@pytest.mark.full
def test_a_folder_has_one_training_at_a_time(recipe, tmp_path):
    home = tmp_path / "small" / "vae"
    home.mkdir(parents=True)
    lock = home / "training.lock"
    lock.write_text("left by one that was killed")
    with held(lock) as own:
        assert own
        with pytest.raises(GuidekitError, match=rf"vae is being trained by .*:{os.getpid()}\)"):
            train(recipe, tmp_path, quiet=True)
        assert not (home / "checkpoint.safetensors").exists()
    assert train(recipe, tmp_path, quiet=True).exists()
    assert not lock.exists()


def test_built_in_recipes_are_valid():
    assert {"scenes", "scenes-judge"} <= set(recipes())
    for name in recipes():
        assert read_recipe(name).stages


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model = 1 1", "not TOML"),
        ('model = "x"\nsize = 8', "[[stage]]"),
        ('model = "x"\nsize = 8\n[[stage]]\ntask = "dance"', "no task 'dance'"),
        ('model = "x"\nsize = 8\n[[stage]]\ntask = "text"\nsteps = 1\nwidht = 3', "'widht'"),
        ('model = "x"\n[[stage]]\ntask = "text"\nsteps = 1', "the keys model, size"),
        ('model = "x"\nsize = "big"\n[[stage]]\ntask = "text"', "size must be"),
        ('model = "x"\nsize = 8\n[[stage]]\ntask = "text"', "stage text lacks steps"),
        ('model = "x"\nsize = 8\n[[stage]]\ntask = "text"\nsteps = "no"', "text: steps must be"),
        ('model = "x"\nsize = 0\n[[stage]]\ntask = "text"\nsteps = 1', "size must be 1 or more"),
        ('model = "../x"\nsize = 8\n[[stage]]\ntask = "text"\nsteps = 1', "not '../x'"),
        ('model = "x"\nsize = 8\n[[stage]]\ntask = "text"\nname = ".."\nsteps = 1', "not '..'"),
    ],
)
def test_wrong_recipe_says_what_is_wrong(tmp_path, text, says):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(GuidekitError) as error:
        read_recipe(path)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("save_every = 0", "save_every must be 1 or more, not 0"),
        ("batch = -3", "batch must be 1 or more, not -3"),
        ("lr = -1.0", "lr must be 0 or more, not -1"),
        ("lr = nan", "lr must be 0 or more, not nan"),
        ("clip = 0.0", "clip must be above 0, not 0"),
        ("ema = 1.0", "ema must be 0 or more and below 1, not 1"),
        ('precision = "half"', "precision must be no or bf16 or fp16, not 'half'"),
    ],
)
def test_numbers_that_no_training_has_are_refused(tmp_path, line, says):
    path = tmp_path / "r.toml"
    path.write_text(f'model = "x"\nsize = 8\n[[stage]]\ntask = "judge"\nsteps = 1\n{line}')
    with pytest.raises(GuidekitError, match="stage judge: ") as error:
        read_recipe(path)
    assert says in str(error.value)


def test_missing_recipe_names_those_that_exist():
    with pytest.raises(GuidekitError, match="scenes-judge"):
        read_recipe("nothing")


def test_learning_rate_rises_then_falls():
    options = Options(steps=100, warmup=10, lr=1.0)
    rates = [lr_at(i, options) for i in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[10]
    assert rates[-1] < 0.02


def test_every_word_of_the_world_is_one_token():
    tokenizer = train_tokenizer(TextOptions())
    words = [*scenes.SHAPES, *scenes.COLOURS, *scenes.BACKGROUNDS, "background", "and"]
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    assert tokenizer.decode(tokenizer("zebra 7!")["input_ids"][1:-1]).replace(" ", "") == "zebra7!"


def test_varied_captions_keep_every_phrase():
    import numpy as np

    rng = np.random.default_rng(0)
    texts = set()
    for number in range(50):
        plan = scenes.scene(number)
        text = varied_caption(plan, rng)
        texts.add(text)
        assert all(thing.phrase in text for thing in plan.things)
    assert len({t.split()[0] for t in texts}) > 2


PIXELS = """
model = "small"
size = {size}
[[stage]]
task = "pixels"
data = "{data}"
channels = [16, 32]
jitter = 0.5
steps = 2
batch = 4
"""


@pytest.mark.parametrize(("data", "size"), [("digits", 8), ("scenes", 16)])
def test_pixel_recipes_end_in_an_unconditional_pipeline(tmp_path, data, size):
    path = tmp_path / "small.toml"
    path.write_text(PIXELS.format(data=data, size=size))
    model = train(path, tmp_path, quiet=True)
    drawn = Sampling(load(str(model)), Condition(), seeds=[0], steps=2).finish().images
    assert drawn.shape == (1, 1 if data == "digits" else 3, size, size)


def test_jitter_keeps_the_border_and_moves_the_picture():
    pictures = -torch.ones(2, 1, 8, 8)
    pictures[:, :, 2:6, 3:5] = 1
    moved = jitter(pictures, 1.0, torch.Generator().manual_seed(0))
    assert not torch.equal(moved[0], moved[1])
    assert float(moved[..., 0, 0].max()) == -1
    torch.testing.assert_close(moved.mean((1, 2, 3)), pictures.mean((1, 2, 3)), atol=0.1, rtol=0)
    assert jitter(pictures, 0.0, torch.Generator()) is pictures


def test_splits_of_the_digits_share_no_picture():
    parts = {name: {p.numpy().tobytes() for p in digits.split(name)[0]} for name in digits.SPLITS}
    counts = {name: len(digits.split(name)[0]) for name in digits.SPLITS}
    assert counts == {"train": 1000, "judge": 400, "test": 397}
    assert not parts["train"] & parts["judge"]
    assert not parts["train"] & parts["test"]
    pictures, labels = digits.shots(2, draw=1)
    assert labels.tolist() == sorted(list(range(10)) * 2)
    assert {p.numpy().tobytes() for p in pictures} <= parts["train"]
    assert not torch.equal(pictures, digits.shots(2, draw=2)[0])


def test_digits_judge_trains(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text('model = "j"\nsize = 8\n[[stage]]\ntask = "digits"\nsteps = 120\nlr = 3e-3\n')
    judge = DigitJudge.from_pretrained(train(path, tmp_path, quiet=True), dtype=torch.float32)
    pictures, labels = digits.split("test")
    with torch.no_grad():
        found = judge.eval()(pictures)[0].argmax(1)
    assert (found == labels).float().mean() > 0.8


def test_every_stage_says_what_it_does_before_it_begins(recipe, tmp_path, capsys, monkeypatch):
    """A log of a batch job, which has no terminal, is never silent for long."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    told = []

    def making(*args):
        told.append(capsys.readouterr().out)
        return make_vae(*args)

    options, make_vae = TASKS["vae"]
    monkeypatch.setitem(TASKS, "vae", (options, making))
    recipe.write_text(RECIPE[: RECIPE.index('[[stage]]\ntask = "text"')])
    train(recipe, tmp_path)
    assert told == ["stage    vae (vae): 6 steps of 4\n"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        f"vae      step {step} of 6" for step in range(1, 7)
    ]
    assert all(" s left" in line and ", l1 " in line for line in lines)
