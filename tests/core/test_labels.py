"""Label sets and label maps: what files mean, what resizing keeps, what is refused."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from guidekit import GuidekitError, LabelMap, LabelSet, load_label_set, read_label_map
from guidekit.inputs.label_files import as_label_map
from guidekit.labels import VOID, label_sets

TWO = LabelSet("two", ("sky", "grass"), ((0, 0, 255), (0, 255, 0)), things=("grass",))
INFINITE = {"segments_info": [{"id": float("inf"), "category_id": 1}]}
IDS = torch.tensor([[0, 0, 1], [1, VOID, 0]])


def test_the_shipped_sets():
    assert label_sets() == ["ade20k-150", "coco-stuff-182"]
    ade, coco = map(load_label_set, label_sets())
    assert (len(ade), len(coco)) == (150, 182)
    assert (len(ade.things), len(coco.things)) == (100, 91)
    assert ade.classes[:3] == ("wall", "building", "sky")
    assert ade.palette[0] == (120, 120, 120)
    assert ade.palette[2] == (6, 230, 230)
    # Numbers in ADE20K's files count from 1, 0 is void; COCO-Stuff's from 0, 255 is void.
    assert (ade.first, ade.void, coco.first, coco.void) == (1, (0,), 0, (255,))


def test_coco_stuffs_palette_is_the_bits_of_the_number():
    """Number plus one, its bits dealt to red, green and blue in turn, from the highest down."""
    coco = load_label_set("coco-stuff-182")
    for index, colour in enumerate(coco.palette):
        back = 0
        for bit in range(7):
            for channel in range(3):
                back |= ((colour[channel] >> (7 - bit)) & 1) << (3 * bit + channel)
        assert back == index + 1


def test_a_set_is_the_same_after_json(tmp_path):
    TWO.save(tmp_path / "two.json")
    assert load_label_set(tmp_path / "two.json") == TWO
    (tmp_path / "short.json").write_text('{"classes": ["a", "b"]}')
    assert load_label_set(tmp_path / "short.json") == LabelSet("short", ("a", "b"))


def test_cocos_categories_are_a_set(tmp_path):
    rows = [
        {"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60]},
        {"id": 92, "name": "banner", "isthing": 0, "color": [255, 255, 128]},
    ]
    (tmp_path / "coco.json").write_text(json.dumps({"categories": rows}))
    found = load_label_set(tmp_path / "coco.json")
    assert found.classes == ("person", "banner")
    assert found.things == ("person",)
    assert found.palette[1] == (255, 255, 128)


@pytest.mark.parametrize(
    "form",
    ["indexed", "grey", "16 bits", "colours", "palette of colours"],
)
def test_every_file_means_the_same_map(tmp_path, form):
    path, label_map = tmp_path / "map.png", LabelMap(IDS, TWO)
    numbers = np.where(IDS.numpy() == VOID, 255, IDS.numpy())
    if form == "indexed":
        label_map.indexed().save(path)
    elif form == "grey":
        Image.fromarray(numbers.astype(np.uint8)).save(path)
    elif form == "16 bits":
        Image.fromarray(numbers.astype(np.uint16)).save(path)
    elif form == "colours":
        label_map.coloured().save(path)
    else:  # its numbers mean nothing, its colours do
        label_map.coloured().quantize(8).save(path)
    assert torch.equal(read_label_map(path, TWO).ids, IDS)


def test_numbers_begin_where_the_set_says(tmp_path):
    ade = load_label_set("ade20k-150")
    Image.fromarray(np.array([[0, 1, 150]], np.uint8)).save(tmp_path / "ade.png")
    found = read_label_map(tmp_path / "ade.png", ade)
    assert found.ids.tolist() == [[VOID, 0, 149]]
    found.indexed().save(tmp_path / "again.png")
    assert torch.equal(read_label_map(tmp_path / "again.png", ade).ids, found.ids)
    found.coloured().save(tmp_path / "colours.png")
    assert torch.equal(read_label_map(tmp_path / "colours.png", ade).ids, found.ids)


def test_a_panoptic_pair(tmp_path):
    numbers = np.array([[7, 7, 300], [300, 0, 7]])
    bands = np.stack([numbers % 256, numbers // 256, numbers * 0], -1)
    Image.fromarray(bands.astype(np.uint8)).save(tmp_path / "map.png")
    rows = [{"id": 7, "category_id": 1}, {"id": 300, "category_id": 2}]
    (tmp_path / "map.json").write_text(json.dumps({"segments_info": rows}))
    assert torch.equal(read_label_map(tmp_path / "map.png", TWO).ids, IDS)
    named = [{"id": 1, "name": "sky"}, {"id": 2, "name": "moon"}]
    table = {"segments_info": rows, "categories": named}
    (tmp_path / "map.json").write_text(json.dumps(table))
    with pytest.raises(GuidekitError, match="has no class 'moon'; it has sky, grass"):
        read_label_map(tmp_path / "map.png", TWO)
    for wrong in (
        {"segments_info": 3},
        {"segments_info": [3]},
        {"segments_info": [{"id": 7}]},
        INFINITE,
    ):
        (tmp_path / "map.json").write_text(json.dumps(wrong))
        refused("is not in COCO's form", read_label_map, tmp_path / "map.png", TWO)
    (tmp_path / "map.json").write_text(json.dumps({"segments_info": rows[:1]}))
    with pytest.raises(GuidekitError, match="says nothing of the segments 300"):
        read_label_map(tmp_path / "map.png", TWO)


def panoptic(path, numbers=((1, 1, 2), (2, 0, 1))):
    """A PNG of segment numbers."""
    bands = np.zeros((*np.shape(numbers), 3), np.uint8)
    bands[..., 0] = numbers
    Image.fromarray(bands).save(path)


@pytest.mark.parametrize("place", ["maps.json", "panoptic_val.json", "maps/panoptic.json"])
def test_a_panoptic_data_set_has_one_json(tmp_path, place):
    """As COCO has it: `annotations` of all images, and categories whose ids leave numbers out."""
    (tmp_path / "maps").mkdir()
    rows = [
        {"file_name": name, "segments_info": [{"id": 1, "category_id": 13 + i},
                                              {"id": 2, "category_id": 14 - i}]}
        for i, name in enumerate(["0.png", "1.png"])
    ]  # fmt: skip
    named = [{"id": 14, "name": "sky"}, {"id": 13, "name": "grass"}]
    table = {"annotations": rows, "categories": named}
    (tmp_path / place).write_text(json.dumps(table))
    for name in ("0.png", "1.png", "2.png"):
        panoptic(tmp_path / "maps" / name)
    found = [read_label_map(tmp_path / "maps" / name, TWO).ids for name in ("0.png", "1.png")]
    assert torch.equal(found[1], IDS)
    assert torch.equal(found[0], IDS.where(IDS == VOID, 1 - IDS))
    # One that no JSON lists is a map of colours.
    refused("have colours that label set", read_label_map, tmp_path / "maps/2.png", TWO)
    (tmp_path / place).write_text(json.dumps({"annotations": rows}))
    refused("what category 13 is; add `cat", read_label_map, tmp_path / "maps/0.png", TWO)


def test_category_ids_of_a_set_may_leave_numbers_out(tmp_path):
    """COCO has no 12: 13 is the twelfth category, not the thirteenth."""
    rows = [{"id": i, "name": f"class {i}"} for i in (*range(1, 12), 13, 14)]
    (tmp_path / "coco.json").write_text(json.dumps({"categories": rows}))
    labels = load_label_set(tmp_path / "coco.json")
    panoptic(tmp_path / "map.png")
    info = [{"id": 1, "category_id": 13}, {"id": 2, "category_id": 1}]
    (tmp_path / "map.json").write_text(json.dumps({"segments_info": info}))
    labels.save(tmp_path / "again.json")
    for own in (labels, load_label_set(tmp_path / "again.json")):
        found = read_label_map(tmp_path / "map.png", own)
        assert own.classes[found.ids[0, 0]] == "class 13"
    refused("2 ids of categories for 3", LabelSet, "x", ("a", "b", "c"), category_ids=(1, 2, 2))


def test_many_categories_have_another_void(tmp_path):
    rows = [{"id": i, "name": f"class {i}"} for i in range(300)]
    (tmp_path / "many.json").write_text(json.dumps({"categories": rows}))
    labels = load_label_set(tmp_path / "many.json")
    ids = torch.tensor([[VOID, 255, 299]])
    LabelMap(ids, labels).indexed().save(tmp_path / "map.png")
    assert torch.equal(read_label_map(tmp_path / "map.png", labels).ids, ids)


def test_resizing_makes_no_third_class():
    ids = torch.arange(9).reshape(3, 3) % 3 * 2
    labels = LabelSet("five", tuple("abcde"))
    for size in ((7, 5), (2, 2), (9, 3)):
        assert set(LabelMap(ids, labels).resized(*size).present) <= {0, 2, 4}
    assert torch.equal(LabelMap(ids, labels).resized(6, 6).ids[::2, ::2], ids)


def test_one_hot_is_zero_where_void():
    found = LabelMap(IDS, TWO).one_hot()
    assert found.shape == (2, 2, 3)
    assert torch.equal(found.sum(0), (IDS != VOID).float())
    assert torch.equal(found[1], (IDS == 1).float())


def refused(text, call, *args, **options):
    with pytest.raises(GuidekitError, match=text) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_refused(tmp_path):
    refused("names a twice", LabelSet, "x", ("a", "a"))
    refused("1 colours for 2 classes", LabelSet, "x", ("a", "b"), ((0, 0, 0),))
    refused("'c' of its things is no class", LabelSet, "x", ("a", "b"), things=("c",))
    refused("no label set 'ade'; give a JSON file, or one of ade20k", load_label_set, "ade")
    refused("has no palette", LabelMap(IDS, LabelSet("x", ("a", "b"))).coloured)
    refused("holds 2; label set 'two' has the indices 0 to 1", LabelMap, IDS + 1, TWO)
    refused("void pixels.*no number", LabelMap(IDS, LabelSet("x", ("a", "b"), void=())).indexed)
    for table, text in [
        ({"classes": ["a"], "color": 1}, "no key 'color'; it has format, name"),
        ({"classes": "a"}, "`classes` must be a list"),
        ({"classes": ["a", 3]}, "must be a text, not 3"),
        ({"classes": ["a"], "palette": ["#ff"]}, "'#ff' is no colour such as"),
        ({"classes": ["a"], "first": -1}, "whole number of at least 0, not -1"),
        ({"classes": ["a"], "format": 2}, "reads format 1"),
        ({"classes": []}, "has 0 classes"),
        ({"categories": [{"id": 1}]}, "every category has a `name`"),
    ]:
        (tmp_path / "set.json").write_text(json.dumps(table))
        refused(text, load_label_set, tmp_path / "set.json")
    path = tmp_path / "map.png"
    Image.fromarray(np.array([[0, 9]], np.uint8)).save(path)
    refused(
        r"50.00% of its pixels hold 9; label set 'two' has 0 to 1, void 255",
        read_label_map,
        path,
        TWO,
    )
    Image.new("RGB", (2, 2), "#123456").save(path)
    refused("100.00% of its pixels have colours that.*#123456", read_label_map, path, TWO)
    refused("is in colour.*has no palette", read_label_map, path, LabelSet("x", ("a", "b")))
    Image.new("RGB", (2, 2)).save(tmp_path / "map.jpg")
    refused("is a JPEG", read_label_map, tmp_path / "map.jpg", TWO)


def test_a_class_is_not_void_as_well():
    refused("255 is a class and void", LabelSet, "many", tuple(map(str, range(256))))
    assert len(LabelSet("many", tuple(map(str, range(256))), void=())) == 256


def test_an_indexed_map_of_the_first_class_alone_is_read_by_number():
    labels = LabelSet("two", ("a", "b"), palette=((200, 0, 0), (0, 200, 0)))
    for shown in ([[0, 1]], [[0, 0]]):
        image = Image.fromarray(np.array(shown, np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 128, 0, 0])
        assert as_label_map(image, labels).ids.tolist() == shown


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"annotations": 3}'])
def test_a_json_of_another_kind_beside_the_folder_is_none_of_the_maps(tmp_path, text):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps.json").write_text(text)
    Image.fromarray(np.ones((4, 4), "uint8")).save(tmp_path / "maps/m.png")
    found = read_label_map(tmp_path / "maps/m.png", load_label_set("coco-stuff-182"))
    assert found.present == [1]


def test_a_map_of_numbers_is_none_of_a_panoptic_table_that_lists_its_name(tmp_path):
    (tmp_path / "maps").mkdir()
    table = {"annotations": [{"file_name": "m.png", "segments_info": []}]}
    (tmp_path / "panoptic_val.json").write_text(json.dumps(table))
    Image.fromarray(np.zeros((4, 4), "uint8")).save(tmp_path / "maps/m.png")
    found = read_label_map(tmp_path / "maps/m.png", load_label_set("coco-stuff-182"))
    assert found.present == [0]


def test_a_panoptic_table_that_is_damaged_is_told(tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "panoptic_val.json").write_text('{"annotations": [')
    Image.new("RGB", (4, 4)).save(tmp_path / "maps/m.png")
    with pytest.raises(GuidekitError, match="panoptic_val.json"):
        read_label_map(tmp_path / "maps/m.png", load_label_set("coco-stuff-182"))


def test_a_set_of_many_classes_without_void_has_another_number_for_it(tmp_path):
    (tmp_path / "many.json").write_text(json.dumps({"classes": [f"c{i}" for i in range(300)]}))
    assert load_label_set(tmp_path / "many.json").void == (65535,)


@pytest.mark.parametrize("kind", ["u1", "i2", "u2", ">u2", "i8", "?"])
def test_a_label_map_takes_arrays_of_whole_numbers(kind):
    """Of any width, byte order and strides; void in a kind with a sign."""
    own = np.array([[0, 1, 1], [1, 0, 1]]).astype(kind)
    own.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LabelMap(np.fliplr(own), TWO)
    assert found.ids.tolist() == [[1, 1, 0], [1, 0, 1]]
    assert found.ids.dtype == torch.int64
    assert LabelMap(torch.from_numpy(own.astype("u1")), TWO).ids.dtype == torch.int64


@pytest.mark.parametrize("wrong", [np.ones((2, 2)), np.array([["a"]]), [[0, 1]], torch.ones(2, 2)])
def test_a_label_map_of_anything_else_is_refused(wrong):
    with pytest.raises(GuidekitError, match="a label map is") as error:
        LabelMap(wrong, TWO)
    assert "\n" not in str(error.value)
