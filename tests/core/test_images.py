"""One reader: every mode and depth of a file shows the same colours, whoever reads it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from guidekit.errors import GuidekitError
from guidekit.heads import read_examples
from guidekit.images import as_rgb, fitted, load_image, middle, numbered, read_image, shares
from guidekit.references import Reference, load_reference, load_references, read_references
from guidekit.semantica.data import _decode
from guidekit.semantica.sources import folder_items
from image_files import FILES, RGB, SIDE, saved

SIZE = (SIDE, SIDE)


def examples(path):
    """As few-shot heads read it."""
    (path.parent / "labels.csv").write_text(f"file_name,label\n{path.name},a;b\n")
    return read_examples(path.parent, SIZE).images(0)


def encoded(path):
    """As Semantica's encoders see it."""
    path = path.rename(path.with_suffix(".png"))  # what it is called does not count
    (item,) = folder_items(path.parent)
    return _decode(item, SIZE)[0] / 127.5 - 1


READERS = {
    "image": lambda path: read_image(path, SIZE),
    "reference": lambda path: load_reference(path).pixels(SIDE),
    "references": lambda path: read_references([path], SIZE)[0],
    "examples": examples,
    "encoded": encoded,
}


@pytest.mark.parametrize("name", FILES)
def test_every_reader_sees_what_a_file_shows(name, tmp_path):
    file = FILES[name]
    for reader, read in READERS.items():
        seen = (read(file.write(tmp_path)) + 1) * 127.5
        off = np.abs(seen.permute(1, 2, 0).numpy() - file.shown.astype(float)).max()
        assert off <= file.within + 1e-3, reader
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.mark.parametrize("mode", ["RGBa", "PA", "HSV", "YCbCr", "CMYK", "RGBX"])
def test_images_of_pillows_other_modes(mode):
    alpha = np.dstack([RGB, np.full(SIZE, 128, np.uint8)])
    made = {
        "RGBa": Image.fromarray(alpha).convert("RGBa"),
        "PA": Image.fromarray(alpha).convert("P").convert("PA"),
    }.get(mode) or Image.fromarray(RGB).convert(mode)
    shown = as_rgb(made)
    assert shown.mode == "RGB"
    assert shown.size == made.size
    if mode == "RGBa":
        expected = RGB * (128 / 255) + 255 * (127 / 255)
        assert np.abs(np.asarray(shown) - expected).max() <= 2


def test_a_reference_shows_what_its_file_shows(tmp_path):
    """Also where a user opens the file: modes, orientation and transparency are of one meaning."""
    for name in ("turned RGBA", "16 bits", "P, a clear index"):
        path = FILES[name].write(tmp_path)
        with Image.open(path) as image:
            assert Reference(image).image.tobytes() == load_reference(path).image.tobytes()
            assert Reference(image).picture.mode == "RGB"


@pytest.mark.parametrize(
    "values, says",
    [
        (np.full(SIZE, -0.5, np.float32), "from -0.5 to -0.5; save it in 8 or 16 bits"),
        (np.full(SIZE, np.nan, np.float32), "from nan to nan"),
        (np.full(SIZE, 1.5, np.float32), "from 1.5 to 1.5"),
        (np.full(SIZE, 300, np.float32), "from 300 to 300"),
        (np.full(SIZE, 2**20, np.int32), "1.04858e"),
        (np.full(SIZE, -1, np.int32), "from -1 to -1"),
    ],
)
def test_greys_without_a_white_are_refused_with_their_range(values, says, tmp_path):
    (tmp_path / "a.tif").write_bytes(saved(Image.fromarray(values), "TIFF"))
    with pytest.raises(GuidekitError, match=f"image .*a.tif: its values reach .*{says}"):
        load_image(tmp_path / "a.tif")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_fractions_are_shares(values):
    given = np.array([[1.0, *values]])
    assert np.allclose(shares(given), given, atol=1e-6)
    assert np.array_equal(
        shares((given * 65535).astype(np.uint16)), shares(given * 65535 // 1 / 65535)
    )


# Shapes


@given(st.tuples(*[st.integers(1, 300)] * 2), st.tuples(*[st.integers(1, 300)] * 2))
def test_the_middle_has_the_wanted_shape_and_lies_inside(given, wanted):
    left, top, right, bottom = middle(given, wanted)
    assert 0 <= left < right <= given[0]
    assert 0 <= top < bottom <= given[1]
    assert (right - left) * wanted[0] == pytest.approx((bottom - top) * wanted[1], rel=1e-6)
    assert right - left == pytest.approx(given[0]) or bottom - top == pytest.approx(given[1])
    assert abs(left - (given[0] - right)) <= 1 + 1e-6  # an odd pixel
    assert abs(top - (given[1] - bottom)) <= 1 + 1e-6


def three(width: int, height: int) -> Image.Image:
    """Red, green and blue, along the longer side."""
    image = Image.new("RGB", (width, height), "blue")
    step = max(width, height) // 3
    for i, colour in enumerate(("red", "lime")):
        at, past = i * step, (i + 1) * step
        image.paste(colour, (at, 0, past, height) if width > height else (0, at, width, past))
    return image


@pytest.mark.parametrize("size", [(24, 8), (8, 24)])
def test_a_reference_that_is_no_square_is_cut_padded_or_cut_thrice(size):
    image = three(*size)
    red, green, blue = (torch.tensor(c).view(3, 1, 1) * 2.0 - 1 for c in torch.eye(3).tolist())
    reference = Reference(image)
    assert torch.equal(reference.pixels(8), green.expand(3, 8, 8))
    views = reference.views(8, "crops")
    assert torch.equal(views, torch.stack([c.expand(3, 8, 8) for c in (red, green, blue)]))
    assert torch.equal(Reference(image, fit="crops").pixels(8), views[1])
    (padded,) = reference.views(24, "pad")
    assert torch.equal(Reference(image, fit="pad").pixels(24), padded)
    along = padded if size[0] > size[1] else padded.transpose(1, 2)
    assert (along[:, :8] == 1).all()
    assert (along[:, 16:] == 1).all()
    for i, colour in enumerate((red, green, blue)):
        assert torch.equal(along[:, 8:16, 8 * i : 8 * i + 8], colour.expand(3, 8, 8))


def test_a_square_is_the_same_however_it_is_fitted():
    image = Image.fromarray(RGB)
    for fit, count in (("crop", 1), ("pad", 1), ("crops", 3)):
        found = fitted(image, SIZE, fit)
        assert len(found) == count
        assert all(f.tobytes() == image.tobytes() for f in found)


def test_a_reference_of_a_path_is_the_loaded_one(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    loaded = load_reference(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        found = Reference(path, fit="pad")
        assert found.image.tobytes() == loaded.image.tobytes()
        assert (found.path, found.fit) == (loaded.path, "pad")
    with pytest.raises(GuidekitError, match="an image or the path of one, not ndarray"):
        Reference(RGB)


def test_a_fit_that_is_none_is_refused():
    with pytest.raises(GuidekitError, match="fit is one of crop, pad, crops, not 'whole'"):
        Reference(Image.fromarray(RGB), fit="whole")


def test_parts_of_a_drawings_shape(tmp_path):
    three(24, 8).save(tmp_path / "a.png")
    found = read_references([tmp_path / "a.png"], (8, 16), "crops")
    assert found.shape == (3, 3, 8, 16)
    expected = ImageOps.fit(three(24, 8), (16, 8))
    assert torch.equal(found[1], torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 127.5 - 1)
    assert (found[0, 0, :, 0] == 1).all()
    assert (found[2, 0] == -1).all()
    assert len(read_references(["scene-3"], (8, 16), "crops")) == 3


# Names


def test_numbers_in_names_are_numbers(tmp_path):
    names = ["10", "9", "b2", "b10", "1"]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    assert list(load_references(tmp_path)) == ["1", "9", "10", "b2", "b10"]


@given(st.data())
def test_every_list_of_names_has_one_order(data):
    names = data.draw(st.lists(st.text("a01٣-²", max_size=6), unique=True))
    shuffled = data.draw(st.permutations(names))
    assert sorted(names, key=numbered) == sorted(shuffled, key=numbered)
