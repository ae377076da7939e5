"""Training a noise-aware CLIP: its loss and data, two processes, recipes, exact continuation."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

import clips
from guidekit import Condition, Denoiser, Sampling
from guidekit.errors import GuidekitError
from guidekit.noisy_clip.data import Folder, open_data, reshaped
from guidekit.noisy_clip.files import load_clip
from guidekit.noisy_clip.loss import info_nce
from guidekit.noisy_clip.model import CleanClip, NoisyClip, look
from guidekit.noisy_clip.train import (
    Alignment,
    NoisyClipOptions,
    NoisyClipTask,
    logsnr_at,
    noised,
)
from guidekit.testing.miniatures import sd3_pipeline
from guidekit.train import recipe
from guidekit.train.loop import Loop, Options
from guidekit.worlds import scenes
from guidekit_clip import Clip


def pictures(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_info_nce_is_not_rounded_by_autocast():
    a, b = torch.randn(16, 8), torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = info_nce(a, b, 100.0)
    assert torch.equal(rounded, info_nce(a, b, 100.0))


def test_info_nce_is_the_mean_of_both_cross_entropies():
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    cosines = torch.cosine_similarity(a[:, None], b[None], dim=-1) * 10
    both = [-(c.diagonal() - c.logsumexp(1)).mean() for c in (cosines, cosines.T)]
    torch.testing.assert_close(info_nce(a, b, 10.0), sum(both) / 2)
    twins = info_nce(a[[0, 0, 1]], b[[0, 0, 1]], 10.0, torch.tensor([5, 5, 6]))
    torch.testing.assert_close(twins, info_nce(a[[0, 1]], b[[0, 1]], 10.0) * 0 + twins)
    assert twins < info_nce(a[[0, 0, 1]], b[[0, 0, 1]], 10.0)


PROCESSES = """
import sys, torch, torch.distributed as dist
from guidekit.noisy_clip.loss import info_nce
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
layer, x, y = torch.nn.Linear(6, 5), torch.randn(8, 6), torch.randn(8, 5, requires_grad=True)
scale = torch.tensor(20.0, requires_grad=True)
keys = torch.tensor([0, 1, 2, 3, 0, 5, 6, 7])
dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
part = slice(4 * rank, 4 * rank + 4)
asked = (layer.weight, y, scale)
loss = info_nce(layer(x[part]), y[part], scale, keys[part])
grads = torch.autograd.grad(loss, asked)
for found in (loss.detach(), *grads):
    dist.all_reduce(found)
dist.destroy_process_group()
alone = info_nce(layer(x), y, scale, keys)
whole = torch.autograd.grad(alone, asked)
torch.testing.assert_close(loss.detach() / 2, alone.detach())
for grad, expected in zip(grads, whole, strict=True):
    torch.testing.assert_close(grad / 2, expected)
"""


def test_two_processes_see_the_negatives_of_both(tmp_path):
    code = textwrap.dedent(PROCESSES)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)], stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()


TRAINER = """
import sys, torch
from guidekit.train.recipe import train
torch.set_num_threads(1)
train(sys.argv[1], sys.argv[2], quiet=True)
"""


def test_two_processes_train_one_encoder(tmp_path):
    """Every trained weight has a gradient in each process, or they would wait for each other."""
    clips.clip("resnet").save(tmp_path / "base")
    path = tmp_path / "r.toml"
    path.write_text(f"""
model = "small"
size = 32
[[stage]]
task = "noisy-clip"
base = "{tmp_path / "base"}"
width = 8
steps = 3
batch = 4
log_every = 1
""")
    meet = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_PORT": str(random.Random().randint(20000, 50000)),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(path), str(tmp_path / "out")],
            env=os.environ | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    rows = (tmp_path / "out/small/noisy-clip/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    made = NoisyClip.from_pretrained(tmp_path / "out/small/noisy-clip/model")
    assert made(pictures(), torch.zeros(3)).embedding.isfinite().all()


def test_levels_of_training_cover_the_schedule():
    logsnr = logsnr_at(torch.tensor([0.0, 0.5, 1.0]))
    assert logsnr[0] > 12
    assert abs(logsnr[1]) < 1e-5
    assert logsnr[2] < -12
    x0, eps = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    torch.testing.assert_close(noised(x0, eps, logsnr).flatten()[1], torch.tensor(0.5**0.5))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(5):
        picture, _ = scenes.draw(scenes.scene(i), 40)
        Image.fromarray(picture[: 30 + i]).save(folder / ("more" if i % 2 else "") / f"{i}.png")
    return folder


def test_a_folder_shows_every_picture_once_in_a_round(photos):
    data = Folder(photos)
    seen = torch.cat([data.pictures(range(i, i + 5), 16, torch.Generator()) for i in (0, 5)])
    for part in seen.split(5):
        # Mirroring keeps the mean colour, which tells the five apart.
        assert len(np.unique(part.mean((2, 3)).numpy().round(3), axis=0)) == 5
    with pytest.raises(GuidekitError, match="neither 'scenes' nor a folder"):
        open_data(str(photos / "none"))


def train(folder, photos, steps):
    torch.manual_seed(0)
    clips.clip().save(folder / "base")
    task = NoisyClipTask(NoisyClipOptions(base="base", data=str(photos), width=8), folder, 32)
    options = Options(steps=4, batch=5, lr=1e-3, warmup=1, log_every=1, save_every=2)
    loop = Loop(task, options, folder / "run", quiet=True)
    loop.options.steps = steps
    loop.run()
    return loop


RECIPE = """
model = "small"
size = 32
[[stage]]
task = "clip"
patch = 16
width = 32
layers = 1
heads = 2
text_layers = 1
steps = 2
batch = 4
[[stage]]
task = "noisy-clip"
base = "clip/model"
width = 8
steps = 2
batch = 4
"""


def test_a_recipe_makes_a_clip_and_its_noise_aware_version(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    noisy = NoisyClip.from_pretrained(recipe.train(path, tmp_path, quiet=True))
    clean = CleanClip(load_clip(tmp_path / "small" / "clip" / "model"))
    words = ["a red circle on a white background", "a blue square"]
    torch.testing.assert_close(noisy.texts(words), clean.texts(words), rtol=1e-2, atol=1e-2)
    assert clean.tokenizer(words).shape == (2, 32)
    assert noisy(pictures(), torch.zeros(3)).embedding.shape == (3, 128)


@pytest.mark.parametrize("pull", [0.0, 2.0])
def test_the_loss_is_info_nce_and_the_pull_to_the_clean_embedding(pull):
    clip = clips.clip("vit")
    encoder, frozen = NoisyClip(clip, 16).eval(), clip.model.visual
    x0, eps = pictures(4).clamp(-1, 1), pictures(4).flip(0)
    logsnr = torch.tensor([4.0, 1.0, 0.0, -2.0])
    losses = Alignment(encoder, frozen, 30.0, pull)(x0, x0, eps, logsnr, torch.arange(4))
    noisy = encoder(noised(x0, eps, logsnr), logsnr).embedding
    clean = look(frozen, encoder.normalised(x0)).embedding
    away = 1 - torch.nn.functional.cosine_similarity(noisy, clean)
    assert away.mean() > 5e-3
    torch.testing.assert_close(losses["pull"], pull * 30 * away.mean())
    torch.testing.assert_close(losses["info_nce"], info_nce(noisy, clean, 30.0))


def test_equal_pictures_of_a_small_folder_are_no_negatives(photos):
    keys = open_data(str(photos)).keys(range(3, 11)).tolist()
    files = open_data(str(photos)).pictures(range(3, 11), 16, torch.Generator().manual_seed(0))
    for i in range(8):
        for j in range(i):
            same = torch.equal(files[i], files[j]) or torch.equal(files[i], files[j].flip(-1))
            assert (keys[i] == keys[j]) == same


def test_an_encoder_of_latents_sees_what_the_denoiser_does(tmp_path, photos):
    """Shift and scale of the autoencoder, as SD3 has them."""
    pipe = sd3_pipeline()
    pipe.vae.save_pretrained(tmp_path / "vae")
    clips.clip().save(tmp_path / "base")
    options = NoisyClipOptions(
        base="base", data=str(photos), width=8, autoencoder=str(tmp_path / "vae")
    )
    task = NoisyClipTask(options, tmp_path, 32)
    given = task.batch(range(4), torch.Generator().manual_seed(0))
    expected = Denoiser(pipe).latents(given["pixels"])
    torch.testing.assert_close(given["x0"], expected, rtol=1e-4, atol=1e-5)
    assert pipe.vae.config.shift_factor
    assert expected.std() > 0.1
    loop = Loop(task, Options(steps=2, batch=4, warmup=1), tmp_path / "run", quiet=True)
    loop.run()
    loop.export(tmp_path / "made")
    guidance = Clip(encoder=str(tmp_path / "made"), text="a red circle")
    size = {"height": 32, "width": 32}
    drawn = Sampling(pipe, Condition("red"), [guidance], steps=2, **size).finish()
    assert drawn.account.acted("clip")
    with pytest.raises(GuidekitError, match="trained on noise in images of 32x32, here are 64x64"):
        Sampling(pipe, Condition("red"), [guidance], steps=2, height=64, width=64).finish()
    with pytest.raises(GuidekitError, match="or take a clean CLIP"):
        guidance = Clip(encoder=str(tmp_path / "made"), text="a", on="x0")
        Sampling(pipe, Condition("red"), [guidance], steps=2, **size).finish()


def test_the_papers_rate_and_batch_are_the_tasks_own(tmp_path):
    path = tmp_path / "bare.toml"
    path.write_text('model = "x"\nsize = 32\n[[stage]]\ntask = "noisy-clip"\nsteps = 9')
    (stage,) = recipe.read_recipe(path).stages
    loop = stage.loop
    assert (loop.lr, loop.weight_decay, loop.batch, loop.steps) == (1e-4, 1e-3, 256, 9)


def test_neighbours_of_a_batch_differ_in_shapes_only():
    plans = [reshaped(i, 4) for i in range(8, 12)]
    assert len({p.background for p in plans}) == 1 == len({p.things[0].colour for p in plans})
    assert len({p.things[0].shape for p in plans}) == 4
    assert all(len({t.phrase for t in p.things}) == len(p.things) for p in plans)


def test_no_option_of_a_task_is_one_of_the_loop():
    loop = {field.name for field in dataclasses.fields(Options)}
    for task in recipe.TASKS:
        kind, _ = recipe.task_kind(task)
        assert not loop & {field.name for field in dataclasses.fields(kind)}


def test_training_moves_the_image_encoder_only_and_continues_exactly(tmp_path, photos):
    whole = train(tmp_path / "whole", photos, 4)
    train(tmp_path / "parts", photos, 2)
    parts = train(tmp_path / "parts", photos, 4)
    for one, two in zip(whole.weights, parts.weights, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    rows = (tmp_path / "parts" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
    assert all("info_nce" in json.loads(row) for row in rows)
    before, after = load_clip(tmp_path / "whole" / "base").model, whole.task.net.encoder
    assert torch.equal(before.positional_embedding, after.clip.positional_embedding)
    moved = after.visual.conv1.weight - before.visual.conv1.weight
    assert moved.abs().max() > 1e-5
    assert torch.equal(whole.task.net.frozen.conv1.weight, before.visual.conv1.weight)
    whole.export(tmp_path / "made")
    x = pictures()
    again = NoisyClip.from_pretrained(tmp_path / "made")
    clean = look(before.visual, again.normalised(x)).embedding
    assert (again(x, torch.zeros(3)).embedding - clean).abs().max() > 1e-3
