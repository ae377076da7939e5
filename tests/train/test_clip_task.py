"""The task `clip`: which images and captions of which worlds it shows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from guidekit.__main__ import main
from guidekit.noisy_clip.data import reshaped
from guidekit.train.clip import ClipOptions, ClipTask
from guidekit.train.recipe import read_recipe
from guidekit.train.text import TextOptions, tokenize, train_tokenizer, varied_caption
from guidekit.train.worlds import PRINTS
from guidekit.worlds import prints, scenes

SMALL = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "embedding": 16,
    "text_width": 16,
    "text_layers": 1,
    "text_heads": 2,
}
UNUSED = torch.Generator()  # the task draws by number


@pytest.fixture(scope="module")
def both():
    """The task of both worlds, as its recipe has them."""
    (stage,) = read_recipe("worlds-clip").stages
    return ClipTask(ClipOptions(sources=stage.options.sources, **SMALL), 32)


def plans_of(task, numbers):
    """The scenes of each world."""
    every = [task.plan(number) for number in numbers]
    return {name: [plan for own, plan in every if own == name] for name in task.worlds}


def test_images_are_of_both_worlds_in_equal_numbers(both):
    plans = plans_of(both, range(64))
    assert {name: len(own) for name, own in plans.items()} == {"scenes": 32, "prints": 32}
    for name, world in (("scenes", scenes), ("prints", prints)):
        assert {t.phrase for plan in plans[name] for t in plan.things} <= set(world.CLASSES)


def test_neighbours_differ_in_their_shapes_alone(both):
    for own in plans_of(both, range(64)).values():
        for first in range(0, len(own), both.alike):
            near = own[first : first + both.alike]
            assert len({plan.things[0].shape for plan in near}) == both.alike
            bare = [[replace(t, shape="") for t in plan.things] for plan in near]
            assert all(things == bare[0] for things in bare)
            assert len({plan.background for plan in near}) == 1


def test_a_batch_has_the_images_and_the_captions_of_its_scenes(both):
    batch, plans = both.batch(range(32), UNUSED), plans_of(both, range(32))
    assert (batch["pixels"].shape, batch["ids"].shape) == ((32, 3, 32, 32), (32, 32))
    drawn = [scenes.batch(plans["scenes"], 32)[0], PRINTS.images(plans["prints"], 32)]
    torch.testing.assert_close(batch["pixels"], torch.cat(drawn))
    for ids, plan in zip(batch["ids"], plans["scenes"] + plans["prints"], strict=True):
        text = both.tokenizer.decode(ids, skip_special_tokens=True)
        assert all(thing.phrase in text for thing in plan.things)


def test_captions_of_both_worlds_have_many_wordings(both):
    for name, world in both.worlds.items():
        plan, rng = world.scene(0), np.random.default_rng(0)
        texts = {world.varied_caption(plan, rng) for _ in range(60)}
        assert plan.caption in texts, name
        assert len(texts) > 10, name


def test_every_word_of_both_worlds_is_one_token(both):
    words = {word for name in (*scenes.DENSE, *prints.DENSE) for word in name.split()}
    lengths = {word: len(both.tokenizer(word).input_ids) - 2 for word in words}
    assert set(lengths.values()) == {1}


def test_equal_keys_are_one_caption(both):
    keys = both.batch(range(400), UNUSED)["keys"].numpy()
    plans = [plan for own in plans_of(both, range(400)).values() for plan in own]
    said = [(p.background, *sorted(t.phrase for t in p.things)) for p in plans]
    same = np.array([[a == b for b in said] for a in said])
    assert same.sum() > len(said)  # some captions come twice
    assert np.array_equal(keys[:, None] == keys[None], same)


def test_one_world_is_that_of_the_scenes_alone():
    task = ClipTask(ClipOptions(**SMALL), 32)
    assert task.tokenizer.get_vocab() == train_tokenizer(TextOptions()).get_vocab()
    plans = [reshaped(i, task.alike) for i in range(12)]
    batch = task.batch(range(12), UNUSED)
    assert torch.equal(batch["pixels"], scenes.batch(plans, 32)[0])
    texts = [varied_caption(plan, np.random.default_rng(plan.number)) for plan in plans]
    assert torch.equal(batch["ids"], tokenize(task.tokenizer, texts))


def test_a_preview_shows_every_world(both):
    pixels, texts = both.shown()
    assert texts[0] == scenes.scene(0, "test").caption
    assert texts[12] == prints.scene(0, "test").caption
    assert torch.equal(pixels[12:], PRINTS.images([prints.scene(i, "test") for i in range(12)], 32))
    whole = np.asarray(both.preview()).shape
    assert whole[0] == whole[1]
    assert whole[0] % len(texts) == 0


@pytest.mark.parametrize("names", ['["scenes", "prnts"]', "[]", '["prints", "prints"]', "[1]"])
def test_wrong_sources_are_refused_before_anything_is_written(names, tmp_path):
    recipe = tmp_path / "own.toml"
    stage = f'[[stage]]\ntask = "clip"\nsteps = 2\nsources = {names}\n'
    recipe.write_text(f'model = "own"\nsize = 32\n{stage}')
    result = CliRunner().invoke(main, ["train", str(recipe), "--out", str(tmp_path / "runs")])
    assert result.exit_code == 2
    assert "sources is [" in result.stderr
    assert "give one or more of scenes, prints, each once" in result.stderr
    assert not (tmp_path / "runs").exists()
