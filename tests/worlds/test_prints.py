"""The world of prints: the same everywhere, and every pixel of a class."""

import hashlib

import numpy as np

from guidekit.train.judge import JudgeOptions
from guidekit.train.worlds import source
from guidekit.worlds import prints, scenes


def test_plans_are_the_same_on_every_machine():
    text = "\n".join(
        f"{plan.background} "
        + " ".join(
            f"{t.phrase} {t.x:.4f} {t.y:.4f} {t.size:.4f} {t.angle:.4f}" for t in plan.things
        )
        for plan in (prints.scene(i, "shots") for i in range(50))
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e7d8ca71b3a81c5c"


def test_every_pixel_has_a_class():
    assert len(prints.CLASSES) == 64
    assert len(prints.DENSE) == 68
    for number in range(20):
        plan = prints.scene(number)
        image, masks = prints.draw(plan, 32)
        labels = prints.dense_labels(plan, 32)
        ground = prints.DENSE.index(plan.background)
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        assert np.array_equal(labels == ground, ~masks.any(0))
        for thing, mask in zip(plan.things, masks, strict=True):
            assert mask.any()
            assert (labels[mask] == prints.CLASSES.index(thing.phrase)).all()


def test_things_have_their_colours():
    """Of a whole disc without its outline the mean is near the tint, stripes and light aside."""
    found = {}
    for number in range(400):
        plan = prints.scene(number, "test", objects=(1,))
        image, masks = prints.draw(plan, 64)
        colour = plan.things[0].colour
        inside = masks[0] & np.roll(masks[0], 3, 0) & np.roll(masks[0], -3, 0)
        inside &= np.roll(masks[0], 3, 1) & np.roll(masks[0], -3, 1)
        if inside.sum() > 40:
            found.setdefault(colour, []).append(image[inside].mean(0))
    names = list(prints.COLOURS)
    tints = np.array([prints.COLOURS[name] for name in names], float)
    for name, means in found.items():
        distances = np.linalg.norm(tints - np.mean(means, 0), axis=1)
        assert names[int(distances.argmin())] == name


def test_accepted_colours_and_shapes_are_of_the_source():
    assert set(prints.ACCEPTED) == set(prints.COLOURS)
    assert {c for found in prints.ACCEPTED.values() for c in found} <= set(scenes.COLOURS)
    assert set(prints.SAME.values()) <= set(scenes.SHAPES)
    assert not set(prints.COLOURS) & set(scenes.COLOURS)


def test_dense_labels_of_scenes_are_things_and_backgrounds():
    plan = scenes.scene(3)
    sparse, dense = scenes.labels(plan, 32), scenes.dense_labels(plan, 32)
    assert np.array_equal(dense[sparse > 0], sparse[sparse > 0] - 1)
    assert {scenes.DENSE[i] for i in dense[sparse == 0]} == {f"{plan.background} background"}


def test_trainers_see_both_worlds():
    for name, world in (("dense", scenes), ("prints", prints)):
        drawn = source(JudgeOptions(source=name))
        plans = [drawn.scene(i, "judge") for i in range(2)]
        pixels, labels = drawn.images_and_labels(plans, 32)
        assert pixels.shape == (2, 3, 32, 32)
        assert pixels.abs().max() <= 1
        assert np.array_equal(labels[1].numpy() - 1, world.dense_labels(plans[1], 32))
        assert drawn.classes == world.DENSE
