"""Segments, boxes, masks and layout files: what is accepted and what is refused with what words."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from guidekit.conditions import (
    Condition,
    Segment,
    require_segments,
    segment_masks,
    segment_strengths,
)
from guidekit.errors import GuidekitError
from guidekit.layouts import load_layout, parse_segment
from guidekit.masks import box_mask, load_mask, resize_mask


def test_box_covers_its_share_of_the_picture():
    mask = box_mask((0.25, 0.1, 0.75, 0.35), 100)
    assert mask.mean().item() == pytest.approx(0.125, abs=1e-6)
    assert mask[20, 50] == 1
    assert mask[50, 50] == 0
    fine = box_mask((0.105, 0, 0.5, 1), 100)
    assert fine[0, 10].item() == pytest.approx(0.5, abs=1e-5)  # a pixel cut in half


@pytest.mark.parametrize(
    "box",
    [(0.5, 0, 0.2, 1), (0, 0, 1.2, 1), (0, 0.5, 1, 0.5), (-0.1, 0, 1, 1), (float("nan"), 0, 1, 1)],
)
def test_wrong_box_names_the_form(box):
    with pytest.raises(GuidekitError, match="left,top,right,bottom"):
        box_mask(box)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.zeros(4, 4), "empty"),
        (torch.full((4, 4), float("nan")), "NaN"),
        (torch.full((4, 4), 2.0), "0 to 1"),
        (torch.ones(1, 4, 4), "(H, W)"),
    ],
)
def test_wrong_mask_says_why(mask, says):
    with pytest.raises(GuidekitError) as error:
        Segment("red circle", mask)
    assert says in str(error.value)
    assert "red circle" in str(error.value)


def test_resizing_keeps_the_mean_of_a_soft_mask():
    mask = torch.rand(64, 96)
    small = resize_mask(mask, 16, 24)
    assert small.shape == (16, 24)
    assert small.mean().item() == pytest.approx(mask.mean().item(), abs=1e-6)
    assert small[0, 0].item() == pytest.approx(mask[:4, :4].mean().item(), abs=1e-6)


def test_batches_are_padded_with_empty_masks_and_zero_strengths():
    one = Condition("a", segments=(Segment("a", torch.ones(8, 8), 2.0),))
    two = Condition("a b", segments=(*one.segments, Segment("b", torch.ones(5, 5))))
    masks, strengths = segment_masks([one, two], 4, 4), segment_strengths([one, two])
    assert masks.shape == (2, 2, 4, 4)
    assert masks[0, 1].sum() == 0
    assert masks[1, 1].min() == 1
    assert strengths.tolist() == [[2.0, 0.0], [2.0, 1.0]]


def test_segments_are_required_with_a_remedy():
    with pytest.raises(GuidekitError, match="--segment"):
        require_segments([Condition("a")], "zest")


@pytest.mark.parametrize(
    ("name", "tail", "strength"),
    [
        ("circle@2x.png", "", 1.0),
        ("a@0.5.png", "@0.5", 0.5),
        ("a=b.png", "", 1.0),
        ("a=b@2.png", "@1e-1", 0.1),
    ],
)
def test_names_of_mask_files_may_hold_the_signs(tmp_path, name, tail, strength):
    Image.new("L", (2, 1), 255).save(tmp_path / name)
    segment = parse_segment(f"red circle={tmp_path / name}{tail}")
    assert segment.phrase == "red circle"
    assert segment.strength == strength


def test_parse_segment_reads_boxes_files_and_strengths(tmp_path):
    path = tmp_path / "left.png"
    Image.fromarray(np.array([[255, 0]], np.uint8)).save(path)
    assert parse_segment(f"red circle={path}").mask.tolist() == [[1.0, 0.0]]
    segment = parse_segment("blue square=0.5,0.5,0.9,0.9@0.7")
    assert segment.phrase == "blue square"
    assert segment.strength == 0.7
    assert segment.box == (0.5, 0.5, 0.9, 0.9)


@pytest.mark.parametrize(
    "text, phrase, name, strength",
    [
        ("red circle=a=b@2.png", "red circle", "a=b@2.png", 1.0),
        ("red circle=a=b@2.png@0.5", "red circle", "a=b@2.png", 0.5),
        ("e=mc2=left.png", "e=mc2", "left.png", 1.0),
        ("e=mc2 = left.png @ -1", "e=mc2", "left.png", -1.0),
        ("a@b.com=left.png", "a@b.com", "left.png", 1.0),
        ("red circle=circle@2x.png", "red circle", "circle@2x.png", 1.0),
        ("red=m@0.5", "red", "m@0.5", 1.0),
        ("e=mc2=0,0,0.5,1@2", "e=mc2", None, 2.0),
    ],
)
def test_segments_are_cut_where_a_file_or_a_box_is(
    text, phrase, name, strength, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for file in ("a=b@2.png", "left.png", "circle@2x.png", "m@0.5"):
        share = 255 * (np.arange(4) < len(file) % 3 + 1)
        Image.fromarray(share[None].astype(np.uint8)).save(file, "PNG")
    segment = parse_segment(text)
    assert (segment.phrase, segment.strength) == (phrase, strength)
    if name is None:
        assert segment.box == (0, 0, 0.5, 1)
    else:
        assert torch.equal(segment.mask, load_mask(name))
        assert segment.size == (4, 1)


def test_a_segment_that_names_two_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("m.png", "y=m.png"):
        Image.new("L", (2, 2), 255).save(file)
    with pytest.raises(GuidekitError, match="could mean y=m.png or m.png; rename one"):
        parse_segment("x=y=m.png")
    for name in ("none.png", "none@2x.png"):
        with pytest.raises(GuidekitError, match=f"^mask {name}: no such file"):
            parse_segment(f"x=y={name}")


@pytest.mark.parametrize("text", ["red circle", "=a.png", "red=", "red=1,2,3", "red=0,0,1,1@big"])
def test_wrong_segment_text(text):
    with pytest.raises(GuidekitError, match="segment|box"):
        parse_segment(text)


def test_missing_and_broken_masks_are_named(tmp_path):
    with pytest.raises(GuidekitError, match="no such file"):
        load_mask(tmp_path / "none.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(GuidekitError, match="broken.png"):
        load_mask(broken)


def test_transparency_is_the_mask_where_there_is_any(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], np.uint8)).save(path)
    assert load_mask(path).tolist() == [[0.0, 1.0]]


def _layout(tmp_path, layout):
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(layout))
    return path


def test_layout_reads_boxes_masks_indices_and_colours(tmp_path):
    indexed = Image.fromarray(np.array([[0, 1], [2, 2]], np.uint8), "P")
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    indexed.save(tmp_path / "map.png")
    layout = {
        "prompt": "a red circle and a star",
        "map": "map.png",
        "segments": [
            {"phrase": "red circle", "value": 2, "strength": 0.5},
            {"phrase": "star", "box": [0, 0, 0.5, 1]},
        ],
    }
    condition = load_layout(_layout(tmp_path, layout))
    assert condition.prompt == "a red circle and a star"
    assert condition.segments[0].mask.tolist() == [[0, 0], [1, 1]]
    assert condition.segments[0].strength == 0.5
    assert condition.segments[1].box == (0, 0, 0.5, 1)
    indexed.convert("RGB").save(tmp_path / "map.png")
    layout["segments"] = [{"phrase": "star", "value": "#ff0000"}]
    assert load_layout(_layout(tmp_path, layout)).segments[0].mask.tolist() == [[0, 1], [0, 0]]


def _masks_of(tmp_path, image, values, **options):
    """Masks of a layout's map."""
    name = options.pop("name", "map.png")
    image.save(tmp_path / name, **options)
    layout = {"map": name, "segments": [{"phrase": "a", "value": value} for value in values]}
    return [s.mask for s in load_layout(_layout(tmp_path, layout)).segments]


INDEX = np.zeros((32, 48), np.uint16)
INDEX[4:20, 6:30], INDEX[22:30, 20:44] = 1, 2
TWO = np.array([[255, 255, 255], [255, 0, 0], [0, 90, 200]], np.uint8)


@pytest.mark.parametrize("high", [7, 300, 26001, 65535])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_maps_of_16_bits_hold_indices(tmp_path, kind, high):
    values = np.array([0, 5, high], np.uint16)[INDEX]
    name = f"map.{kind[:3].lower()}"
    found = _masks_of(tmp_path, Image.fromarray(values), [high, 5], name=name)
    assert np.array_equal(found[0], INDEX == 2)
    assert np.array_equal(found[1], INDEX == 1)
    with pytest.raises(GuidekitError, match=f"no pixel of the map is 3; it holds 0, 5, {high}"):
        _masks_of(tmp_path, Image.fromarray(values), [3])
    with pytest.raises(GuidekitError, match="16 bits or more, so `value` must be a whole number"):
        _masks_of(tmp_path, Image.fromarray(values), ["#ff0000"])


@pytest.mark.parametrize("value", [1, "#ff0000", "red"])
def test_a_palette_is_asked_by_index_or_by_colour(tmp_path, value):
    image = Image.fromarray(INDEX.astype(np.uint8), "P")
    image.putpalette(TWO.flatten().tolist())
    (found,) = _masks_of(tmp_path, image, [value])
    assert np.array_equal(found, INDEX == 1)
    greys = Image.fromarray(INDEX.astype(np.uint8))
    assert np.array_equal(_masks_of(tmp_path, greys, [1])[0], INDEX == 1)
    assert np.array_equal(_masks_of(tmp_path, greys.convert("RGB"), [1])[0], INDEX == 1)


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_colours_of_a_jpeg_are_those_that_were_saved(tmp_path, quality, subsampling):
    """To the pixel, but for the edges of its blocks of colour."""
    image = Image.fromarray(TWO[INDEX]).resize((480, 320), Image.Resampling.NEAREST)
    options = dict(name="map.jpg", quality=quality, subsampling=subsampling)
    big = np.kron(INDEX, np.ones((10, 10)))
    for asked in ((1, 2), (1,), (2,)):  # colours that nobody asks for count too
        colours = ["#" + bytes(TWO[i]).hex() for i in asked]
        found = _masks_of(tmp_path, image, colours, **options)
        for mask, i in zip(found, asked, strict=True):
            assert (mask.numpy() != (big == i)).mean() < 0.005


def test_a_jpeg_without_the_colour_is_refused_with_its_own(tmp_path):
    image = Image.fromarray(TWO[INDEX]).resize((480, 320), Image.Resampling.NEAREST)
    with pytest.raises(
        GuidekitError, match="no pixel of the map is #00ff00; it holds #fefefe, #fd0000"
    ) as error:
        _masks_of(tmp_path, image, ["#00ff00"], name="map.jpg", quality=90)
    assert "#005ac8" in str(error.value)  # the colours that it was made of
    with pytest.raises(GuidekitError, match="a JPEG keeps no numbers; save the map as PNG"):
        _masks_of(tmp_path, image.convert("L"), [1], name="map.jpg")


def test_maps_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (found,) = _masks_of(tmp_path, Image.fromarray(INDEX), [1], exif=exif)
    assert np.array_equal(found, np.rot90(INDEX == 1, -1))


def test_masks_of_maps_know_their_shape(tmp_path):
    Image.fromarray(INDEX).save(tmp_path / "m.png")
    layout = {"map": "m.png", "segments": [{"phrase": "a", "value": 1}]}
    assert load_layout(_layout(tmp_path, layout)).segments[0].size == (48, 32)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"promt": "x"}, "promt"),
        ({"segments": {}}, "list"),
        ({"segments": [{"phrase": "a"}]}, "one of `box`"),
        ({"segments": [{"phrase": "a", "box": [0, 1]}]}, "four numbers"),
        ({"segments": [{"phrase": "a", "box": [0, 0, 1, 1], "mask": "m.png"}]}, "one of"),
        ({"segments": [{"phrase": "a", "value": 3}]}, "map"),
        ({"segments": [{"phrase": "a", "mask": "none.png"}]}, "no such file"),
        ({"segments": [{"phrase": 3, "box": [0, 0, 1, 1]}]}, "phrase"),
        ([], "object"),
    ],
)
def test_wrong_layout_names_the_key(tmp_path, layout, says):
    with pytest.raises(GuidekitError) as error:
        load_layout(_layout(tmp_path, layout))
    assert says in str(error.value)


def test_map_value_that_does_not_occur_names_those_that_do(tmp_path):
    Image.fromarray(np.array([[0, 7]], np.uint8)).save(tmp_path / "m.png")
    layout = {"map": "m.png", "segments": [{"phrase": "a", "value": 3}]}
    with pytest.raises(GuidekitError, match="0, 7"):
        load_layout(_layout(tmp_path, layout))
