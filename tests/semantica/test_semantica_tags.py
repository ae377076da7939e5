"""An encoder trained on to name objects: labels, a falling loss, a recipe whose model reads it."""

import json

import pytest
import torch

import semantica_tiny
from guidekit import load
from guidekit.errors import GuidekitError
from guidekit.semantica.encode import from_open_clip, load_encoder
from guidekit.semantica.model import VARIANTS
from guidekit.semantica.tags import TagsOptions, TagsTask, held
from guidekit.train.recipe import train
from guidekit.worlds import scenes

RECIPE = """
model = "small"
size = 16
[[stage]]
task = "tags"
encoder = "{encoder}"
heads = 2
steps = 6
batch = 16
lr = 3e-3
log_every = 1
preview_every = 6
[[stage]]
task = "semantica"
encoder = "tags/model"
pages = 6
per_page = 3
low = -1.0
high = 1.0
steps = 2
batch = 4
preview_every = 1000
"""


@pytest.fixture
def encoder(tmp_path):
    semantica_tiny.encoder().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_labels_are_the_objects_that_a_scene_holds():
    plans = [scenes.scene(i) for i in range(20)]
    for row, plan in zip(held(plans), plans, strict=True):
        named = {scenes.CLASSES[i] for i in row.nonzero().flatten()}
        assert named == {thing.phrase for thing in plan.things}


def test_a_recipe_trains_the_encoder_and_then_the_model_that_reads_it(
    tmp_path, encoder, monkeypatch
):
    monkeypatch.setitem(VARIANTS, "tiny", semantica_tiny.UVIT)
    path = tmp_path / "small.toml"
    path.write_text(RECIPE.format(encoder=encoder))
    folder = train(path, tmp_path / "out", quiet=True)
    rows = (tmp_path / "out/small/tags/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 6
    assert all("tags" in json.loads(row) for row in rows)
    assert (tmp_path / "out/small/tags/preview-000006.png").exists()
    tagged = load_encoder(tmp_path / "out/small/tags/model")
    pixels = scenes.batch([scenes.scene(0)], 16)[0]
    assert (tagged(pixels)[0] - load_encoder(encoder)(pixels)[0]).abs().max() > 1e-2
    assert tagged.config.source.endswith("with tags")
    assert not any(p.requires_grad for p in tagged.parameters())
    shipped = load(folder).encoder
    assert "_name_or_path" not in (folder / "encoder/config.json").read_text()
    assert torch.equal(shipped(pixels)[0], tagged(pixels)[0])


def test_every_layer_of_the_encoder_gets_a_gradient(encoder):
    task = TagsTask(TagsOptions(encoder=str(encoder), heads=2), 16)
    task.net(**task.batch(range(4), torch.Generator()))["tags"].backward()
    moved = [p.grad is not None and p.grad.abs().max() > 0 for p in task.net.parameters()]
    assert all(moved)


def test_the_built_in_clip_is_exported_as_an_encoder(tmp_path):
    task = TagsTask(TagsOptions(), 32)
    task.export(tmp_path / "model")
    pixels = scenes.batch([scenes.scene(0)], 32)[0]
    again = load_encoder(tmp_path / "model")(pixels)[0]
    torch.testing.assert_close(again, load_encoder("scenes-clip")(pixels)[0], rtol=0, atol=2e-2)


def test_the_objects_of_eight_scenes_are_learned(encoder):
    torch.manual_seed(0)
    task = TagsTask(TagsOptions(encoder=str(encoder), heads=2), 16)
    batch = task.batch(range(8), torch.Generator())
    optimizer = torch.optim.Adam(task.net.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        task.net(**batch)["tags"].backward()
        optimizer.step()
    found = task.net.logits(batch["pixels"]) > 0
    assert (found == batch["held"].bool()).float().mean() > 0.99
    assert found.any()


def test_an_architecture_that_open_clip_lacks_is_refused():
    with pytest.raises(GuidekitError, match="list_models"):
        from_open_clip("no-such-net", None)
