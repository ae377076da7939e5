"""Scenes of cut-outs: the same on every call, masks that are the alpha's, names from a table."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from guidekit.errors import GuidekitError
from guidekit.worlds.grounds import GROUNDS
from guidekit.worlds.objects import (
    MAX_OVERLAP,
    SIZES,
    Scene,
    Thing,
    World,
    caption,
    read_things,
    varied_caption,
)

SIDE = 96
FORMS = {"disc": "red disc", "box": "blue box", "arrow": "arrow", "bar": "ice bar"}


def draw_cutouts(folder):
    """Four cut-outs with a transparent border, and the table of their names."""
    for name in FORMS:
        image = Image.new("RGBA", (64, 64))
        pen = ImageDraw.Draw(image)
        if name == "disc":
            pen.ellipse((8, 8, 55, 55), fill=(220, 30, 30, 255))
        elif name == "box":
            pen.rectangle((8, 8, 55, 55), fill=(30, 30, 220, 255))
        elif name == "arrow":
            pen.polygon([(8, 8), (55, 32), (8, 55)], fill=(20, 120, 40, 255))
        else:
            pen.rectangle((8, 24, 55, 40), fill=(120, 200, 220, 255))
        image.save(folder / f"{name}.png")
    lines = [f'{name} = "{words}"' for name, words in FORMS.items()]
    (folder / "things.toml").write_text("[things]\n" + "\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(draw_cutouts(tmp_path_factory.mktemp("cutouts")))


def placed(kind, mirrored=False, angle=0, x=0.5, y=0.5, size=0.5):
    thing = Thing(kind, x, y, size, angle, mirrored)
    return Scene("train", 0, "white", (thing,))


def test_a_scene_is_a_function_of_its_number_and_split(world):
    again = World(world.cutouts.files["red disc"].parent)
    for number in (0, 7, 10**9):
        first, second = world.scene(number, "judge"), again.scene(number, "judge")
        assert first == second
        for a, b in zip(world.draw(first, SIDE), again.draw(second, SIDE), strict=True):
            np.testing.assert_array_equal(a, b)
    plans = {split: world.scene(3, split) for split in ("train", "test", "judge", "shots", "tune")}
    assert len({plan.things for plan in plans.values()}) == len(plans)


def test_scenes_hold_one_to_three_kinds_on_every_ground(world):
    plans = [world.scene(i) for i in range(300)]
    assert {len(plan.things) for plan in plans} == {1, 2, 3}
    assert {plan.ground for plan in plans} == set(GROUNDS)
    assert len(GROUNDS) >= 8
    for plan in plans:
        kinds = [thing.kind for thing in plan.things]
        assert len(set(kinds)) == len(kinds)
        low, high = SIZES[len(kinds)]
        assert all(low - 0.011 <= thing.size <= high + 0.011 for thing in plan.things)


def test_things_hardly_overlap_and_lie_inside(world):
    for plan in (world.scene(i, objects=(3,)) for i in range(100)):
        boxes = [(t.x, t.y, t.size) for t in plan.things]
        for i, (x, y, size) in enumerate(boxes):
            assert size / 2 - 1e-9 <= min(x, y)
            assert max(x, y) <= 1 - size / 2 + 1e-9
            for x2, y2, size2 in boxes[:i]:
                dx = max((size + size2) / 2 - abs(x - x2), 0)
                dy = max((size + size2) / 2 - abs(y - y2), 0)
                least = min(size, size2)
                assert min(dx, least) * min(dy, least) <= MAX_OVERLAP * least**2 + 1e-9


def test_masks_are_where_the_alpha_covers(world):
    image, (mask,) = world.draw(placed("blue box"), SIDE)
    wanted = np.zeros((SIDE, SIDE), bool)
    wanted[24:72, 24:72] = True
    np.testing.assert_array_equal(mask, wanted)
    inside = image[26:70, 26:70].reshape(-1, 3)
    assert np.abs(inside.astype(int) - (30, 30, 220)).max() <= 2
    assert image[:20].min() > 200  # the ground, beside the shadow


def test_what_stands_before_hides_what_stands_behind(world):
    behind = Thing("blue box", 0.5, 0.5, 0.5, 0, False)
    before = Thing("red disc", 0.6, 0.5, 0.3, 0, False)
    plan = Scene("train", 0, "night", (behind, before))
    image, masks = world.draw(plan, SIDE)
    assert not (masks[0] & masks[1]).any()
    assert image[48, 58, 0] > 200
    assert masks[1, 48, 58]
    labels = world.labels(plan, SIDE)
    assert labels[48, 58] == 1 + world.classes.index("red disc")
    assert labels[30, 30] == 1 + world.classes.index("blue box")
    assert labels[2, 2] == 0


def test_a_shadow_darkens_the_ground_below(world):
    image, (mask,) = world.draw(placed("blue box", y=0.4), SIDE)
    bottom = np.flatnonzero(mask.any(1)).max()
    assert image[bottom + 2, 48].mean() < image[bottom + 2, 4].mean() - 10


def test_mirrored_and_turned(world):
    _, (plain,) = world.draw(placed("arrow"), SIDE)
    _, (mirrored,) = world.draw(placed("arrow", mirrored=True), SIDE)
    np.testing.assert_array_equal(plain[:, ::-1], mirrored)
    _, (bar,) = world.draw(placed("ice bar"), SIDE)
    _, (turned,) = world.draw(placed("ice bar", angle=15), SIDE)
    assert np.ptp(np.flatnonzero(turned.any(1))) > np.ptp(np.flatnonzero(bar.any(1))) + 4


def test_captions_name_every_thing():
    assert caption(["cake", "glass", "lemon"], "blue") == (
        "a cake, a glass and a lemon on a blue background"
    )
    assert caption(["apple"], "night") == "an apple at night"


def test_wordings_vary_and_keep_every_thing(world):
    rng = np.random.default_rng(0)
    plan = world.scene(5, objects=(2,))
    texts = {varied_caption(plan, rng) for _ in range(200)}
    assert len(texts) > 50
    assert plan.caption in texts
    assert all(thing.kind in text for text in texts for thing in plan.things)
    assert any(not any(words in text for words in GROUNDS[plan.ground]) for text in texts)


def test_sizes_share_a_plan(world):
    plan = world.scene(11)
    small, large = world.labels(plan, 64), world.labels(plan, 128)
    assert (small == large[::2, ::2]).mean() > 0.95


def test_unknown_split_names_those_that_exist(world):
    with pytest.raises(GuidekitError, match="splits are train, test, judge"):
        world.scene(0, "validation")


def test_missing_cutout_says_what_there_is_and_how_to_get_them(tmp_path):
    draw_cutouts(tmp_path)
    with pytest.raises(GuidekitError, match=r"no cut-out cat .*arrow\.png.*npm pack"):
        World(tmp_path, {"cat": "cat"})
    with pytest.raises(GuidekitError, match="no such folder"):
        World(tmp_path / "none")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("things = [", "write a \\[things\\] table"),
        ("[other]\na = 'b'", "write a \\[things\\] table"),
        ("[things]\na = 1", "holds lines such as"),
        ("[things]\na = 'cat'\nb = 'cat'", "twice: cat"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, table, says):
    (tmp_path / "things.toml").write_text(table)
    with pytest.raises(GuidekitError, match=says):
        read_things(tmp_path)


def test_names_stay_in_their_folder(tmp_path):
    with pytest.raises(GuidekitError, match="not a file's name"):
        World(tmp_path, {"../secret": "secret"})


def test_empty_cutout_is_refused(tmp_path):
    Image.new("RGBA", (8, 8)).save(tmp_path / "air.png")
    world = World(tmp_path, {"air": "air"})
    with pytest.raises(GuidekitError, match="transparent all over"):
        world.draw(world.scene(0))


def test_the_built_in_table_names_enough(tmp_path):
    things = read_things(tmp_path)
    assert len(things) >= 48
    assert {"cake", "glass", "lemon"} <= set(things.values())
