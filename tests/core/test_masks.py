"""What a mask of every mode and depth means, in a file or in memory, and what is refused."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from guidekit import Condition, GuidekitError, Segment, load_mask
from guidekit.conditions import stretched
from guidekit.masks import as_mask, coverage
from image_files import png, saved

# A disc with a soft edge, in a corner of a rectangle.
Y, X = np.mgrid[:48, :64]
SOFT = (12.5 - np.hypot(X - 20, Y - 18)).clip(0, 1)
HARD = SOFT >= 0.5
WHITE = (255 * HARD).astype(np.uint8)
GREYS = (255 * SOFT).round().astype(np.uint8)
ONE = HARD.astype(np.uint8)


def colour(on, off=(0, 0, 0), where=HARD):
    """One colour on another (48, 64, 3)."""
    return np.where(where[..., None], np.uint8(on), np.uint8(off))


def with_alpha(colours, alpha):
    return np.dstack([colours, np.broadcast_to(alpha, HARD.shape)]).astype(np.uint8)


def palette(colours, index=ONE, **options):
    image = Image.fromarray(index, "P")
    image.putpalette(np.uint8(colours).flatten().tolist())
    return saved(image, "PNG", **options)


def as_png(values, mode=None):
    return saved(Image.fromarray(values, mode), "PNG")


THREE = np.where(X < 30, 1, 2) * ONE  # two objects on a ground
RGB3 = colour((255, 255, 255))
HALVES = (
    np.where(X[..., None] < 20, np.uint8((200, 30, 30)), np.uint8((20, 40, 90))) * ONE[..., None]
)
DEEP = (65535 * SOFT).round().astype(np.uint16)

MEANS = {
    "grey": (as_png(GREYS), GREYS / 255),
    "one bit": (as_png(HARD), HARD),
    "0 and 1": (as_png(ONE), HARD),
    "0 and 1 of 16 bits": (as_png(ONE.astype(np.uint16)), HARD),
    "0 and 1 of 32 bits": (saved(Image.fromarray(ONE.astype(np.int32)), "TIFF"), HARD),
    "0 and 1 in colour": (as_png(colour((1, 1, 1))), HARD),
    "1 everywhere": (as_png(np.ones_like(ONE)), np.ones(HARD.shape)),
    "nothing": (as_png(np.zeros_like(ONE)), np.zeros(HARD.shape)),
    "dim greys": (as_png(GREYS // 4), GREYS // 4 / 255),
    "16 bits": (as_png(DEEP), DEEP / 65535),
    "32 bits of 255": (saved(Image.fromarray(GREYS.astype(np.int32)), "TIFF"), GREYS / 255),
    "fractions": (saved(Image.fromarray(SOFT.astype(np.float32)), "TIFF"), SOFT),
    "fractions of 255": (saved(Image.fromarray(GREYS * np.float32(1)), "TIFF"), GREYS / 255),
    "colour saved grey": (as_png(np.repeat(GREYS[..., None], 3, -1)), GREYS / 255),
    "opaque": (as_png(with_alpha(RGB3, 255)), HARD),
    "nearly opaque": (as_png(with_alpha(RGB3, 254)), HARD),
    "opaque of noise": (as_png(with_alpha(RGB3, 251 + X % 5)), HARD),
    "half opaque everywhere": (as_png(with_alpha(RGB3, 128)), HARD),
    "opaque grey": (as_png(np.dstack([WHITE, np.full_like(WHITE, 255)]), "LA"), HARD),
    "opaque, 0 and 1": (as_png(with_alpha(colour((1, 1, 1)), 255)), HARD),
    "cut out": (as_png(with_alpha(colour((90, 200, 10), (90, 200, 10)), GREYS)), GREYS / 255),
    "black cut out": (as_png(with_alpha(0 * RGB3, GREYS)), GREYS / 255),
    "white cut out": (as_png(with_alpha(RGB3, WHITE)), HARD),
    "photograph cut out": (
        as_png(with_alpha(np.random.default_rng(0).integers(0, 256, RGB3.shape), WHITE)),
        HARD,
    ),
    "clear everywhere": (as_png(with_alpha(RGB3, 0)), np.zeros(HARD.shape)),
    "16 bits, a clear grey": (png(DEEP, 0, (b"tRNS", b"\0\0")), DEEP > 0),
    "red on black": (as_png(colour((255, 0, 0))), HARD),
    "dark blue on black": (as_png(colour((0, 0, 60))), HARD),
    "small and red on black": (
        as_png(colour((255, 0, 0), where=(X == 3) & (Y == 3))),
        (X == 3) & (Y == 3),
    ),
    "colours on black": (as_png(HALVES), HARD),
    "palette black and white": (palette([[0, 0, 0], [255, 255, 255]]), HARD),
    "palette white and black": (palette([[255, 255, 255], [0, 0, 0]]), ~HARD),
    "palette of greys": (palette([[i, i, i] for i in range(256)]), HARD),
    "palette, VOC": (palette([[0, 0, 0], [128, 0, 0]]), HARD),
    "palette, clear ground": (palette([[9, 9, 9], [255, 0, 0]], transparency=0), HARD),
    "white red on black": (as_png(colour((255, 230, 230))), HARD),
    "gif": (saved(Image.fromarray(WHITE), "GIF"), HARD),
    "bmp": (saved(Image.fromarray(WHITE), "BMP"), HARD),
    "webp": (saved(Image.fromarray(RGB3), "WEBP", lossless=True), HARD),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_file_means_what_people_mean(name, tmp_path):
    data, expected = MEANS[name]
    (tmp_path / "m.png").write_bytes(data)
    found = load_mask(tmp_path / "m.png")
    assert found.dtype == torch.float32
    assert found.shape == HARD.shape
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with Image.open(io.BytesIO(data)) as image:
        assert torch.equal(as_mask(image)[0], found)


@pytest.mark.parametrize(
    "kind, size", [("L", 0), ("RGB", 0), ("RGB", 2)], ids=["grey", "colour", "4:2:0"]
)
def test_jpegs_mean_the_same_but_for_their_noise(kind, size, tmp_path):
    Image.fromarray(WHITE).convert(kind).save(tmp_path / "m.jpg", quality=85, subsampling=size)
    assert np.abs(load_mask(tmp_path / "m.jpg").numpy() - HARD).mean() < 0.02
    Image.fromarray(colour((220, 20, 60))).save(tmp_path / "m.jpg", quality=90, subsampling=size)
    assert abs(coverage(load_mask(tmp_path / "m.jpg")) - HARD.mean()) < 0.03  # half a pixel


OUTLINED = np.where(np.hypot(X - 20, Y - 18)[..., None] < 14, 0, 255) + 0 * RGB3
REFUSED = {
    "a map of classes": (as_png(THREE.astype(np.uint8)), "it holds 0 .85.6%., 1 .*, 2 .* layout"),
    "12 bits in 16": (as_png(DEEP // 16), "values from 0 to 4095, and 4095 is nearly black"),
    "8 bits in 16": (as_png(WHITE.astype(np.uint16)), "0 .85.6%., 255 .*nearly black"),
    "red on white": (as_png(colour((255, 0, 0), (255, 255, 255))), "0.0% black and else about #f0"),
    "outlined": (
        as_png(np.where(HARD[..., None], np.uint8((255, 0, 0)), OUTLINED.astype(np.uint8))),
        "% black and else about #f0f0f0",
    ),
    "a photograph": (
        as_png(np.random.default_rng(0).integers(0, 256, RGB3.shape, np.uint8)),
        "coloured mask is on black",
    ),
    "opacity and white": (
        as_png(with_alpha(RGB3, np.where(X < 40, 255, 0))),
        "its opacity covers 62.5% of it and its white 14.4%, and either could be meant",
    ),
    "nothing transparent": (
        as_png(with_alpha(RGB3, np.where(HARD, 255, 200))),
        "nothing of it is transparent .opacity from 200 to 255",
    ),
    "dim fractions": (
        saved(Image.fromarray((SOFT / 20).astype("f4")), "TIFF"),
        "values from 0.0 to 0.05.* is nearly black",
    ),
    "beyond 16 bits": (saved(Image.fromarray(ONE * np.int32(2**20)), "TIFF"), "reach from 0 to"),
    "fractions below 0": (saved(Image.fromarray(SOFT.astype("f4") - 1), "TIFF"), "from -1 to 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_mean_two_things_is_refused_with_what_was_seen(name, tmp_path):
    data, says = REFUSED[name]
    (tmp_path / "m.png").write_bytes(data)
    with pytest.raises(GuidekitError, match=f"mask .*m.png: .*{says}") as error:
        load_mask(tmp_path / "m.png")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value",
    [HARD, ONE, WHITE, ONE.astype(np.int64), (65535 * HARD).astype(np.uint16), HARD * 1.0],
    ids=["bool", "0/1", "0/255", "int64", "16 bits", "float64"],
)
def test_arrays_and_tensors_mean_what_files_mean(value):
    found = [Segment("a", value).mask, Segment("a", Image.fromarray(WHITE)).mask]
    found += [Segment("a", torch.from_numpy(value)).mask]
    for mask in found:
        np.testing.assert_array_equal(mask, HARD)


def test_arrays_of_images_are_images():
    for values in (RGB3, colour((255, 0, 0)), with_alpha(RGB3, 255), with_alpha(0 * RGB3, WHITE)):
        np.testing.assert_array_equal(as_mask(values)[0], HARD)


@pytest.mark.parametrize(
    "value, says",
    [
        (np.full((4, 4), 7, np.uint8), "segment 'a': it holds 7 .100.0%., and 7 is nearly black"),
        (torch.full((4, 4), 70000), "reach from 70000 to 70000"),
        (torch.full((4, 4), -1), "reach from -1 to -1"),
        (torch.full((4, 4), 255.0), "mask values lie from 0 to 1"),
        (np.zeros((0, 4)), r"a mask is \(H, W\), this one is \(0, 4\)"),
        (np.full((1, 4, 4), 1), r"a mask is \(H, W\), this one is \(1, 4, 4\)"),
        (np.array([["a"]]), "a mask holds numbers, not <U1"),
    ],
)
def test_other_arrays_are_refused_in_words(value, says):
    with pytest.raises(GuidekitError, match=says):
        Segment("a", value)


@given(arrays.arrays(bool, st.tuples(st.integers(2, 9), st.integers(2, 9))))
def test_every_way_to_save_a_mask_is_read_as_it_was(mask):
    """But one that covers nearly all, which of a coloured file nobody can tell from a ground."""
    white = (255 * mask).astype(np.uint8)
    ways = [
        Image.fromarray(mask),
        Image.fromarray(white),
        Image.fromarray(mask.astype(np.uint8)),
        Image.fromarray((65535 * mask).astype(np.uint16)),
        Image.fromarray(mask.astype(np.float32)),
        Image.fromarray(np.dstack([white] * 3)),
        Image.fromarray(np.dstack([white] * 3 + [np.full_like(white, 255)])),
    ]
    if (~mask).mean() >= 0.05:
        ways.append(Image.fromarray(np.dstack([white, 0 * white, 0 * white])))
    if not mask.all():
        ways.append(Image.fromarray(np.dstack([0 * white] * 3 + [white])))
    for image in ways:
        np.testing.assert_array_equal(as_mask(image)[0], mask)


def test_coverage_is_the_share_of_the_image():
    assert coverage(torch.tensor([[1.0, 0.5], [0.0, 0.0]])) == 0.375


def test_a_mask_of_another_shape_than_the_drawing_is_said(tmp_path):
    path = tmp_path / "m.png"
    path.write_bytes(MEANS["grey"][0])
    segments = (Segment("a", path), Segment("b", (0, 0, 0.5, 1)), Segment("c", torch.ones(9, 1)))
    condition = Condition("a b c", segments=segments)
    (note,) = stretched([condition], (64, 64))
    assert (
        note
        == "segment 'a': its mask is 64x48 and the drawing 64x64; it is stretched to that shape"
    )
    assert not stretched([condition], (480, 640))
    assert not stretched([condition], (49, 64))


def test_the_run_keeps_the_remark(tmp_path):
    import guidekit
    from guidekit.testing import sd_pipeline

    condition = Condition("a", segments=(Segment("a", Image.fromarray(WHITE)),))
    sampling = guidekit.sample(sd_pipeline(), condition, steps=1)
    assert any("64x48 and the drawing" in note for note in sampling.account.notes)
