"""The task `clip`: which images and captions of which worlds it shows."""

from collections import Counter

import numpy as np
import pytest
import torch

from guidekit.errors import GuidekitError
from guidekit.noisy_clip.data import reshaped
from guidekit.train.clip import ClipOptions, ClipTask
from guidekit.train.recipe import read_recipe
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
NONE = torch.Generator()


@pytest.fixture(scope="module")
def both():
    """The task of both worlds, as its recipe has them."""
    (stage,) = read_recipe("worlds-clip").stages
    return ClipTask(ClipOptions(worlds=stage.options.worlds, **SMALL), 32)


def test_images_are_of_both_worlds_in_equal_numbers(both):
    plans = [both.plan(number) for number in range(64)]
    assert Counter(name for name, _ in plans) == {"scenes": 32, "prints": 32}
    for name, world in (("scenes", scenes), ("prints", prints)):
        phrases = {t.phrase for own, plan in plans if own == name for t in plan.things}
        assert phrases <= set(world.CLASSES)


def test_neighbours_differ_in_their_shapes_alone(both):
    for first in range(0, 64, both.alike):
        (name, *_), plans = zip(*map(both.plan, range(first, first + both.alike)), strict=True)
        count = len({"scenes": scenes.SHAPES, "prints": prints.SHAPE_NAMES}[name])
        assert len({plan.background for plan in plans}) == 1
        assert len({tuple(t.colour for t in plan.things) for plan in plans}) == 1
        assert len({plan.things[0].shape for plan in plans}) == both.alike <= count


def test_a_batch_has_the_images_and_the_captions_of_its_scenes(both):
    batch = both.batch(range(32), NONE)
    assert (batch["pixels"].shape, batch["ids"].shape) == ((32, 3, 32, 32), (32, 32))
    plans = [plan for name, plan in map(both.plan, range(32)) if name == "prints"]
    torch.testing.assert_close(batch["pixels"][16:], PRINTS.images(plans, 32))
    for ids, plan in zip(batch["ids"][16:], plans, strict=True):
        text = both.tokenizer.decode(ids, skip_special_tokens=True)
        assert all(thing.phrase in text for thing in plan.things)


def test_every_word_of_both_worlds_is_one_token(both):
    words = {word for name in (*scenes.DENSE, *prints.DENSE) for word in name.split()}
    lengths = {word: len(both.tokenizer(word).input_ids) - 2 for word in words}
    assert set(lengths.values()) == {1}


def test_equal_keys_are_one_caption_and_the_same_on_every_machine(both):
    keys = both.batch(range(400), NONE)["keys"].numpy()
    plans = [
        plan
        for world in ("scenes", "prints")
        for own, plan in map(both.plan, range(400))
        if own == world
    ]
    said = [(p.background, *sorted(t.phrase for t in p.things)) for p in plans]
    same = np.array([[a == b for b in said] for a in said])
    assert same.sum() > len(said)  # some captions come twice
    assert np.array_equal(keys[:, None] == keys[None], same)
    assert keys[0] == 15777913291695581


def test_one_world_is_as_it_was():
    task = ClipTask(ClipOptions(**SMALL), 32)
    assert [task.plan(i)[1] for i in range(12)] == [reshaped(i, task.alike) for i in range(12)]


def test_a_preview_shows_every_world(both):
    assert both.preview().size[0] == both.preview().size[1]


@pytest.mark.parametrize("worlds", [("scenes", "prnts"), ()])
def test_unknown_worlds_are_named_with_those_that_there_are(worlds):
    with pytest.raises(GuidekitError, match=r"worlds is \[.*give one or more of scenes, prints"):
        ClipTask(ClipOptions(worlds=worlds), 32)
