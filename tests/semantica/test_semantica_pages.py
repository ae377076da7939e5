"""Damaged images, shards and records of pages, and what is refused or left out."""

import functools
import io
import json
import shutil
import struct

import pytest
import torch
from PIL import Image, ImageOps, features
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from guidekit.errors import GuidekitError
from guidekit.images import read_image, upright
from guidekit.masks import load_mask
from guidekit.references import load_reference, load_references, square
from guidekit.semantica import data, pairs
from guidekit.semantica.data import Store
from guidekit.semantica.encode import from_timm, load_encoder
from guidekit.semantica.groups import find_pairs
from guidekit.semantica.pairs import answered, request
from guidekit.semantica.sources import Item, files_below, folder_items, scene_items
from semantica_tiny import SIZE, encoded, encoder, numbers_of, pages_of


@pytest.fixture(scope="module")
def tiny():
    return encoder()


@pytest.fixture
def pages(tiny, tmp_path):
    return encoded(scene_items(6, 2, SIZE), tiny, tmp_path / "pages", chunk=5)


def with_exif(exif: bytes) -> bytes:
    """A red and white JPEG with these bytes for its EXIF."""
    image = Image.new("RGB", (20, 20), "white")
    image.paste("red", (0, 0, 20, 10))
    out = io.BytesIO()
    image.save(out, "jpeg", exif=b"Exif\0\0" + exif, quality=95)
    return out.getvalue()


def entry(tag: int, kind: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, 1, value)


def table(*entries: bytes) -> bytes:
    """A table of EXIF."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def page_of(contents: list[bytes]) -> list[Item]:
    """Items that read these bytes."""
    return [
        Item("a", str(i), lambda content=content: Image.open(io.BytesIO(content)))
        for i, content in enumerate(contents)
    ]


def red_rows(picture: torch.Tensor) -> list[bool]:
    """Whether the first and the last row of a red and white image (3, h, w) are red."""
    return [bool(picture[1, row].float().mean() < 128) for row in (0, -1)]


@pytest.mark.parametrize("tag, kind", [(0x0101, 2), (0x011A, 1)])
def test_pictures_are_turned_though_their_exif_is_damaged(tag, kind, tiny, tmp_path):
    """Pillow cannot write these tables anew: struct.error and TypeError."""
    content = with_exif(table(entry(0x0112, 3, 3), entry(tag, kind, 0x41)))
    (tmp_path / "a.jpg").write_bytes(content)
    found = encoded(iter(page_of([content, content])), tiny, tmp_path / "p")
    assert len(found) == 2
    assert found.totals()["unreadable"] == 0
    for seen in (
        found.rows([0], "pictures")[0][0],
        square(load_reference(tmp_path / "a.jpg").picture, 20),  # turned once
        read_image(tmp_path / "a.jpg", (8, 8)),
    ):
        assert red_rows((seen + 1) * 127.5 if seen.is_floating_point() else seen) == [False, True]


@pytest.mark.parametrize("exif", [table(entry(0x0112, 3, 3))[:18], b"", b"\xff" * 40])
def test_pictures_whose_exif_cannot_be_read_are_kept_as_they_are(exif, tiny, tmp_path):
    found = encoded(iter(page_of([with_exif(exif)])), tiny, tmp_path)
    assert red_rows(found.rows([0], "pictures")[0][0]) == [True, False]


def test_a_png_whose_text_of_exif_is_none_is_kept(tmp_path):
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 4\nno hex")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png", pnginfo=info)
    assert load_reference(tmp_path / "a.png").pixels(4).shape == (3, 4, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((24, 16), 90).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected, found = ImageOps.exif_transpose(image), upright(image)
    assert found.size == expected.size
    assert found.tobytes() == expected.tobytes()
    assert 0x0112 not in found.getexif()


@pytest.mark.parametrize("error", [struct.error, TypeError, RuntimeError, IndexError])
def test_whatever_a_decoder_raises_the_picture_is_counted(error, tiny, tmp_path, monkeypatch):
    """Pillow's decoders have no list of what they raise: AVIF's raises RuntimeError."""

    def broken(self, *args):
        raise error("damaged\0")

    readable = page_of([with_exif(b"")])
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    out = io.BytesIO()
    Image.new("RGB", (9, 9)).save(out, "png")
    (tmp_path / "a.png").write_bytes(out.getvalue())
    found = encoded(iter(page_of([out.getvalue()]) + readable), tiny, tmp_path / "p")
    assert len(found) == 1
    assert found.totals()["unreadable"] == 1
    with pytest.raises(GuidekitError, match="image .*a.png: not a readable image"):
        load_reference(tmp_path / "a.png")
    with pytest.raises(GuidekitError, match="mask .*a.png: not a readable image"):
        load_mask(tmp_path / "a.png")


@pytest.mark.skipif(not features.check("avif"), reason="a Pillow without AVIF")
def test_a_damaged_avif_is_counted(tiny, tmp_path):
    out = io.BytesIO()
    Image.effect_noise((24, 20), 60).convert("RGB").save(out, "avif")
    content = bytearray(out.getvalue())
    content[content.index(b"pitm") + 8] = 0xFF  # the number of the image's own item
    found = encoded(iter(page_of([bytes(content), with_exif(b"")])), tiny, tmp_path / "p")
    assert len(found) == 1
    assert found.totals()["unreadable"] == 1


def test_references_are_kept_no_larger_than_encoders_see(tmp_path):
    for name, size in (("a", (1600, 1200)), ("b", (90, 700)), ("c", (4000, 200))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    sizes = [reference.picture.size for reference in load_references(tmp_path).values()]
    assert sizes == [(691, 518), (90, 700), (1024, 51)]


def test_pickled_encoders_are_refused_unread(tmp_path, tiny, monkeypatch):
    tiny.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert list((tmp_path / "bin").glob("*.bin"))

    def unpickled(*args, **kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", unpickled)
    with pytest.raises(
        GuidekitError, match="bin has no safetensors; save the encoder in that format"
    ):
        load_encoder(tmp_path / "bin")
    save_file({"other": torch.zeros(1)}, tmp_path / "bin/other.safetensors")
    with pytest.raises(GuidekitError, match="diffusion_pytorch_model.safetensors"):
        load_encoder(tmp_path / "bin")


def test_models_of_several_maps_are_refused():
    small = dict(
        embed_dim=(8, 16), num_heads=(1, 1), depth=((1, 1, 0),), img_size=48, img_scale=(1, 1)
    )
    crossed = from_timm("crossvit_tiny_240", pretrained=False, **small)
    with pytest.raises(
        GuidekitError, match="timm/crossvit_tiny_240 has 2 maps of features, not one"
    ):
        crossed.shapes()


def test_bounds_beside_quantiles_are_refused(pages):
    for given in (dict(low=0.1), dict(high=0.5), dict(low=0.1, high=0.5)):
        with pytest.raises(GuidekitError, match="so .* would be ignored; leave one out"):
            find_pairs(pages, quantiles=(0.1, 0.9), **given)
    assert find_pairs(pages, quantiles=(0.0, 1.0)).kept
    assert find_pairs(pages).share == 1


def test_a_filter_is_whole_or_not_there(pages, monkeypatch):
    out, asked = pages.folder / "filter", request(pages, pages.totals(), None, None, None)
    find_pairs(pages)
    assert answered(out, asked)
    assert sorted(path.name for path in out.iterdir()) == [
        "000000.safetensors",
        "filter.json",
        "histogram.png",
    ]
    whole = (out / "filter.json").read_text()
    for cut in (whole[:40], "", "[]"):
        (out / "filter.json").write_text(cut)
        assert not answered(out, asked)

    def full(self, text, *args, **kwargs):
        self.write_bytes(text[:40].encode())
        raise OSError("no space left")

    shutil.rmtree(out)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("pathlib.Path.write_text", full)
        find_pairs(pages)
    assert not (out / "filter.json").exists()
    assert not answered(out, asked)


def test_a_histogram_is_not_cut_by_a_kill(pages, monkeypatch):
    find_pairs(pages)
    histogram = pages.folder / "filter/histogram.png"
    before = histogram.read_bytes()

    def killed(self, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pairs.Image.Image, "save", killed)
        find_pairs(pages)
    assert histogram.read_bytes() == before


def test_the_filter_says_how_many_pictures_could_not_be_read(tiny, tmp_path):
    items = [None, *scene_items(3, 2, SIZE), None]
    find_pairs(encoded(iter(items), tiny, tmp_path))
    assert json.loads((tmp_path / "filter/filter.json").read_text())["unreadable"] == 2


def test_a_folder_is_read_without_what_is_left_out(tmp_path):
    for name in ("b/1.png", "b.png", "a/c/2.png", "a/1.png", "run/pages/3.png", "run/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = [path for path in files_below(tmp_path) if path.name != "link"]
    assert found == sorted(path for path in tmp_path.rglob("*") if path.is_file())
    keys = [item.key for item in folder_items(tmp_path, (tmp_path / "a/../run", tmp_path / "no"))]
    assert keys == ["a/1.png", "a/c/2.png", "b/1.png", "b.png"]
    # Data that lie in the folder that is left out are data all the same.
    assert [i.key for i in folder_items(tmp_path / "run", (tmp_path,))] == ["4.png", "pages/3.png"]


def test_a_folder_of_many_pictures_is_not_held_in_memory(tmp_path, monkeypatch):
    for page in "abc":
        (tmp_path / page).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / page / "1.png")
    read = []
    monkeypatch.setattr(
        "guidekit.semantica.sources.os.scandir",
        lambda path, scandir=data.os.scandir: read.append(path) or scandir(path),
    )
    assert next(folder_items(tmp_path)).key == "a/1.png"
    assert len(read) == 2


def test_long_texts_do_not_outgrow_a_shard(tiny, tmp_path):
    """Pages of one beginning stay two pages; half a character of JSON is no page's end either."""
    long, drawn = "x" * 10**6, functools.partial(Image.new, "RGB", (16, 16))
    names = [long + "1", long + "2", long + "1", "\ud800"]
    items = [Item(page, long, drawn, "é" * 10**6) for page in names]
    found = encoded(iter(items), tiny, tmp_path)
    assert (tmp_path / data.chunk_name(0, 0)).stat().st_size < 200_000
    assert [len(caption) for caption in found.captions([0, 3])] == [data.LONGEST] * 2
    page = pages_of(found)
    assert page[0] == page[2]
    assert len(set(page)) == 3


def test_a_cut_shard_says_what_to_do_and_is_made_anew(tiny, pages):
    whole = (pages.folder / data.chunk_name(0, 1)).read_bytes()
    expected = pages.rows(numbers_of(pages), "pictures", "tokens")
    for number, content in ((1, whole[:-9]), (2, b""), (0, b"\xff" * 99)):
        path = pages.folder / data.chunk_name(0, number)
        path.write_bytes(content)
        with pytest.raises(GuidekitError, match=f"{path} is damaged .*; remove it"):
            find_pairs(Store(pages.folder))
        path.unlink()
        again = encoded(scene_items(6, 2, SIZE), tiny, pages.folder, chunk=5)
        assert again.chunks == {0: 3}
        for a, b in zip(again.rows(numbers_of(again), "pictures", "tokens"), expected, strict=True):
            assert torch.equal(a, b)
