"""Labelled images as people have them: folders, tables, masks; and what is wrong with others."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from guidekit.errors import GuidekitError
from guidekit.heads import read_examples
from guidekit.heads.data import class_map, read_mask, soft_masks

SIZE = (16, 16)


def picture(path, value=128, size=(16, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, value // 2, 255 - value)).save(path)


def test_class_folders_and_an_attribute(tmp_path):
    for name, count in (("positive", 3), ("negative", 2)):
        for i in range(count):
            picture(tmp_path / name / f"{i}.png")
    found = read_examples(tmp_path, SIZE)
    assert found.kind == "classes"
    assert found.classes == ("negative", "positive")
    assert found.per_class == {"negative": 2, "positive": 3}
    assert found.load([0, 4]).shape == (2, 3, 16, 16)


def test_pictures_are_cut_in_the_middle_and_resized(tmp_path):
    picture(tmp_path / "a" / "1.png", 255, (64, 32), "L")
    picture(tmp_path / "b" / "1.png", 0, (8, 8), "L")
    found = read_examples(tmp_path, SIZE, channels=1)
    assert torch.equal(found.load([0, 1]).mean((1, 2, 3)), torch.tensor([1.0, -1.0]))


def test_masks_by_stem_with_names_and_free_pixels(tmp_path):
    for stem in ("x", "y"):
        picture(tmp_path / "images" / f"{stem}.jpg")
        values = np.zeros((16, 16), np.uint8)
        values[:, 8:], values[0] = 3, 255
        mask = Image.fromarray(values).convert("P")
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.putdata(values.flatten().tolist())
        mask.save(tmp_path / "masks" / f"{stem}.png")
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\nsun\n")
    found = read_examples(tmp_path, SIZE)
    assert found.classes == ("sky", "sun")
    assert found.values == (0, 3)
    mask = found.masks(1)
    assert (mask[0] == -1).all()
    assert mask[1, 0] == 0
    assert mask[1, 15] == 1
    soft = soft_masks(mask[None], 2, (4, 4))
    assert float(soft[0, 0, 0, 0]) == 0.75
    assert float(soft[0, 1, 0, 0]) == 0


@pytest.mark.parametrize("name", ["labels.csv", "metadata.jsonl"])
def test_tables_with_several_labels(tmp_path, name):
    sets = [["hat", "smile"], ["hat"], ["smile"]]
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    if name.endswith("csv"):
        lines = ["file_name,label"] + [f"{i}.png,{';'.join(s)}" for i, s in enumerate(sets)]
    else:
        lines = [json.dumps({"file_name": f"{i}.png", "label": s}) for i, s in enumerate(sets)]
    (tmp_path / name).write_text("\n".join(lines))
    found = read_examples(tmp_path, SIZE)
    assert found.kind == "labels"
    assert found.classes == ("hat", "smile")
    assert found.targets.tolist() == [[1, 1], [1, 0], [0, 1]]


def test_a_table_with_a_column_per_label(tmp_path):
    for i in range(2):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "a.csv").write_text("file,hat,smile\n0.png,1,-1\n1.png,0,1\n")
    found = read_examples(tmp_path / "a.csv", SIZE)
    assert found.kind == "labels"
    assert found.targets.tolist() == [[1, 0], [0, 1]]


CATS = {
    "mark in front": ("\ufefffile_name,label\n0.png,cat\n1.png,dog\n", ("cat", "dog")),
    "semicolons": ("file_name;label\n0.png;cat\n1.png;dog\n", ("cat", "dog")),
    "tabs": ("file_name\tlabel\n0.png\tcat\n1.png\tdog\n", ("cat", "dog")),
    "line breaks": ('file_name,label\r\n0.png,"big\n cat"\r\n1.png,dog\r\n', ("big cat", "dog")),
    "commas in quotes": ('file_name,label\n0.png,"cat, big"\n1.png,dog\n', ("cat, big", "dog")),
    "numbers": ("file_name,label\n0.png,10\n1.png,9\n", ("9", "10")),
    "fractions": ("file_name,smile,hat\n0.png,1.0,0.0\n1.png,0,True\n", ("smile", "hat")),
}


@pytest.mark.parametrize("name", CATS)
def test_tables_as_spreadsheets_write_them(tmp_path, name):
    for i in range(2):
        picture(tmp_path / f"{i}.png")
    text, classes = CATS[name]
    (tmp_path / "a.csv").write_bytes(text.encode())
    found = read_examples(tmp_path / "a.csv", SIZE)
    assert found.classes == classes
    assert found.per_class == dict.fromkeys(classes, 1)


def test_json_lines_hold_any_letter(tmp_path):
    """Marks that end a line elsewhere, and one in front of the file."""
    for i in range(2):
        picture(tmp_path / f"{i}.png")
    names = ["a\u2028b\x85c", "d\ne"]
    rows = [{"file_name": f"{i}.png", "label": [n]} for i, n in enumerate(names)]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    assert read_examples(tmp_path, SIZE).classes == ("a b c", "d e")


def test_a_table_without_files_says_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text("name,label\n0.png,cat\n")
    with pytest.raises(GuidekitError, match="no column file_name, .*; it has name, label"):
        read_examples(tmp_path / "a.csv", SIZE)


def test_class_folders_are_sorted_by_number(tmp_path):
    for name in ("10", "9", "1"):
        picture(tmp_path / name / "1.png")
    assert read_examples(tmp_path, SIZE).classes == ("1", "9", "10")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_lie_on_what_a_viewer_shows(tmp_path, orientation):
    """Stored in any orientation, cut and resized alike."""
    colours = np.random.default_rng(0).integers(0, 2, (20, 33), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    stored = Image.fromarray(255 * colours)
    stored.save(tmp_path / "images/a.png", exif=exif)
    ImageOps.exif_transpose(Image.open(tmp_path / "images/a.png")).point(
        lambda v: 3 * (v > 0)
    ).save(tmp_path / "masks/a.png")
    found = read_examples(tmp_path, (20, 20))
    assert torch.equal(found.images(0)[0] > 0, found.masks(0) == 1)
    assert found.values == (0, 3)


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "I;16B", "I", "P", "LA", "RGB", "RGBA"])
def test_masks_of_classes_in_every_depth(tmp_path, mode):
    values = np.random.default_rng(0).integers(0, 2, (16, 16))
    high = 300 if mode.startswith("I") else 1
    deep = (values * high).astype(np.uint16)
    image = {
        "I;16B": lambda: Image.frombytes("I;16B", (16, 16), deep.astype(">u2").tobytes()),
        "I;16": lambda: Image.fromarray(deep),
        "I": lambda: Image.fromarray(deep.astype(np.int32)),
        "1": lambda: Image.fromarray(values > 0),
        "P": lambda: Image.fromarray(values.astype(np.uint8), "P"),
    }.get(mode, lambda: Image.fromarray(values.astype(np.uint8)).convert(mode))()
    if mode == "P":
        image.putpalette([9, 9, 9, 255, 0, 0])
    path = tmp_path / "a.tif"
    image.save(path)
    assert np.array_equal(read_mask(path), values * high)


def _unlabelled(folder):
    picture(folder / "1.png")


def _one_class(folder):
    picture(folder / "cat" / "1.png")


def _empty_class(folder):
    picture(folder / "cat" / "1.png")
    (folder / "dog").mkdir()


def _lonely(folder):
    picture(folder / "images" / "1.png")
    picture(folder / "masks" / "2.png", mode="L")


def _other_size(folder):
    picture(folder / "images" / "1.png")
    picture(folder / "masks" / "1.png", 1, (8, 8), "L")


def _coloured(folder):
    picture(folder / "images" / "1.png")
    picture(folder / "masks" / "1.png")


def _jpeg_mask(folder):
    picture(folder / "images" / "1.png")
    picture(folder / "masks" / "1.jpg", mode="L")


def _corrupt(folder):
    picture(folder / "cat" / "1.png")
    (folder / "dog").mkdir()
    (folder / "dog" / "1.png").write_bytes(b"no image")


def _missing(folder):
    (folder / "labels.csv").write_text("file_name,label\n1.png,cat\n")


def _no_labels(folder):
    picture(folder / "1.png")
    (folder / "labels.csv").write_text("file_name,label\n1.png,\n")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "is empty"),
        (_unlabelled, "have no labels"),
        (_one_class, "one class only"),
        (_empty_class, "dog has no images"),
        (_lonely, "lack image or mask"),
        (_other_size, "they must be the same"),
        (_coloured, "is in colour"),
        (_jpeg_mask, "is a JPEG, which changes the values; save it as an indexed PNG"),
        (_corrupt, "not a readable image"),
        (_missing, "do not exist"),
        (_no_labels, "no label"),
    ],
)
def test_bad_examples_say_what_is_wrong(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(GuidekitError, match=says):
        read_examples(tmp_path, SIZE)


def test_class_map_marks_unknown_values():
    values = np.array([[7, 9], [9, 3]])
    assert class_map(values, (7, 9), (2, 2)).tolist() == [[0, 1], [1, -1]]
