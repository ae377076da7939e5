"""The cache of encoded pages: kills, threads and memory, what is kept and what is refused."""

import functools
import os
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from guidekit.errors import GuidekitError
from guidekit.references import load_reference, square
from guidekit.semantica import data
from guidekit.semantica.data import Store
from guidekit.semantica.episodes import Episodes
from guidekit.semantica.groups import find_pairs
from guidekit.semantica.sources import (
    Item,
    folder_items,
    folder_parts,
    labelled_scene_items,
    scene_items,
)
from semantica_tiny import SIZE, coloured, encoded, encoder, firsts, numbers_of
from semantica_tiny import pipeline as semantica_pipeline


@pytest.fixture(scope="module")
def tiny():
    return encoder()


def test_files_are_not_kept_with_what_was_decoded(tiny, tmp_path):
    """A shard's worth of large originals would be gigabytes."""
    alive, count = [], []

    def items():
        for n in range(6):
            count.append(sum(item() is not None for item in alive))
            item = Item(str(n // 2), str(n), functools.partial(Image.new, "RGB", (16, 16)))
            alive.append(weakref.ref(item))
            yield item

    encoded(items(), tiny, tmp_path / "pages", chunk=6)
    assert len(count) == 6
    assert max(count) <= 1


def test_folders_are_pages(tiny, tmp_path):
    root = tmp_path / "in"
    for name in ("cats/a.jpg", "cats/b.png", "dogs/c.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("LA" if name.endswith("png") else "L", (9, 30), 128).save(root / name)
    (root / "dogs/d.jpg").write_bytes(b"no image")
    pages = encoded(folder_items(root), tiny, tmp_path / "pages")
    assert firsts(pages) == [0, 0, 2]
    assert pages.totals()["unreadable"] == 1
    with pytest.raises(GuidekitError, match="no images below"):
        next(folder_items(tmp_path / "pages"))
    Image.new("L", (9, 9)).save(root / "loose.png")
    for most in (1, 256):  # of parts
        found = [item for part in folder_parts(root, most=most) for item, _ in part.items(0)]
        assert {i.key for i in found} == {i.key for i in folder_items(root)}
    with pytest.raises(GuidekitError, match="no images below"):
        folder_parts(tmp_path / "pages")


def test_encoding_goes_on_where_it_was_killed(tiny, tmp_path):
    class Killed(Exception):
        pass

    def until(last):
        for number, item in enumerate(scene_items(6, 2, SIZE)):
            if number == last:
                raise Killed
            yield item

    whole = encoded(until(None), tiny, tmp_path / "whole", chunk=5)
    with pytest.raises(Killed):
        encoded(until(8), tiny, tmp_path / "cut", chunk=5)
    assert len(Store(tmp_path / "cut")) == 5  # one whole chunk
    opened = []

    def watched():
        for item in scene_items(6, 2, SIZE):
            opened.append(item.key)
            yield item

    again = encoded(watched(), tiny, tmp_path / "cut", chunk=5)
    assert len(again) == len(whole) == 12
    assert again.chunks == {0: 3}
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            again.rows(numbers_of(again), "pictures", "tokens"),
            whole.rows(numbers_of(whole), "pictures", "tokens"),
            strict=True,
        )
    )
    opened.clear()
    encoded(watched(), tiny, tmp_path / "cut", chunk=5)
    assert not opened  # finished
    with pytest.raises(GuidekitError, match="was begun with"):
        encoded(watched(), tiny, tmp_path / "cut", 8)


def test_a_kill_while_a_shard_is_written_loses_that_shard_alone(tiny, tmp_path, monkeypatch):
    def dying(source, target):
        if target.name == "000000-00001.safetensors":
            raise InterruptedError
        os.rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("guidekit.train.durable.os.replace", dying)
        encoded(scene_items(6, 2, SIZE), tiny, tmp_path, chunk=5)
    assert len(Store(tmp_path)) == 5
    again = encoded(scene_items(6, 2, SIZE), tiny, tmp_path, chunk=5)
    assert firsts(again) == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]


def test_the_encoder_sees_pictures_at_its_own_size(tmp_path):
    """As it sees a reference when it draws: small images are not what is encoded."""
    pipe = semantica_pipeline(sample_size=8)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    shown = Image.fromarray(pixels)
    items = iter([Item("a", "0", shown.copy)])
    tokens, pictures = encoded(items, pipe.encoder, tmp_path, 8).rows([0], "tokens", "pictures")
    assert pictures.shape == (1, 3, 8, 8)
    expected = pipe.states(pipe._references(shown))
    torch.testing.assert_close(tokens.float(), expected, atol=2e-3, rtol=2e-3)


def test_photographs_are_turned_and_deep_greys_kept(tmp_path):
    upright = Image.new("RGB", (20, 20), "white")
    upright.paste("red", (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    upright.rotate(180).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        seen = square(image, 20)
    assert seen[1, :8].max() < 30
    assert seen[1, 12:].min() > 225
    picture = load_reference(tmp_path / "a.jpg").picture
    assert torch.equal(square(picture, 20), seen)
    deep = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    grey = square(Image.fromarray(deep), 16)
    assert (grey[0] - torch.tensor(deep >> 8).to(torch.uint8)).abs().max() == 0


def test_nothing_is_begun_by_what_cannot_work(tiny, tmp_path):
    def broken():
        yield from (None, None)

    for _ in range(2):
        with pytest.raises(GuidekitError, match="none of 2 images could be read"):
            find_pairs(encoded(broken(), tiny, tmp_path / "none"))
    with pytest.raises(GuidekitError, match="no images below"):
        encoded(folder_items(tmp_path / "typo"), tiny, tmp_path / "p", facts={"data": 1})
    pages = encoded(scene_items(2, 2, SIZE), tiny, tmp_path / "p", facts={"data": 2})
    assert len(pages) == 4


def test_an_encoder_of_other_weights_is_another(tiny, tmp_path):
    other = tiny.copied()
    next(other.parameters()).data += 1
    assert other.source == tiny.source
    assert tiny.copied().fingerprint() == tiny.fingerprint()
    encoded(scene_items(2, 2, SIZE), tiny, tmp_path)
    with pytest.raises(
        GuidekitError, match="begun with weights '.*', not '.*'; give another folder"
    ):
        encoded(scene_items(2, 2, SIZE), other, tmp_path)


def test_one_shard_of_pictures_is_all_that_is_in_memory(tiny, tmp_path, monkeypatch):
    held, flush = [], data._Writer.flush

    def watched(self, last):
        held.append(len(self.pictures))
        flush(self, last)

    monkeypatch.setattr(data._Writer, "flush", watched)
    encoded(scene_items(5, 2, SIZE), tiny, tmp_path, chunk=4)
    assert held == [4, 4, 2]


def test_scenes_share_what_a_page_shares():
    by_page = {}
    for item in scene_items(4, 3, SIZE):
        by_page.setdefault(item.page, set()).add(item.caption)
    assert len(by_page) == 4
    assert all(len(captions) == 1 for captions in by_page.values())
    polluted = list(scene_items(40, 3, SIZE, polluted=0.5))
    own = [i.caption for i in scene_items(40, 3, SIZE)]
    changed = np.mean([a.caption != b for a, b in zip(polluted, own, strict=True)])
    assert 0.35 < changed < 0.65
    labels = {item.page for item in labelled_scene_items(20, 2, SIZE)}
    assert all(len(label.split()) == 2 for label in labels)
    assert len(labels) > 5


def test_threads_that_decode_keep_the_order(tiny, tmp_path):
    one = encoded(iter(coloured(30, "a")), tiny, tmp_path / "1")
    many = encoded(iter(coloured(30, "a")), tiny, tmp_path / "4", threads=4)
    pictures = [store.rows(numbers_of(store), "pictures", "tokens") for store in (one, many)]
    assert all(torch.equal(a, b) for a, b in zip(*pictures, strict=True))


def test_tokens_that_are_not_kept_are_made_of_what_the_encoder_sees(tiny, tmp_path):
    """The same in half precision, also where images are kept at another size."""
    for size in (SIZE, 8):
        items = [Item("a", str(i), shown.copy) for i, shown in enumerate(noise())]
        kept = encoded(iter(items), tiny, tmp_path / f"kept{size}", size)
        made = encoded(iter(items), tiny, tmp_path / f"made{size}", size, tokens=False)
        for store in (kept, made):
            find_pairs(store, None, None)
        states, x0 = Episodes(kept).batch(range(4))
        seen, same = Episodes(made).batch(range(4), "seen")
        assert torch.equal(x0, same)
        assert x0.shape[-1] == size
        assert seen.shape[-1] == SIZE
        torch.testing.assert_close(tiny(seen)[0], states, atol=2e-3, rtol=2e-3)
        assert not Episodes(made).has_tokens
        assert Episodes(kept).has_tokens


def noise() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)) for _ in range(5)]


def test_texts_are_no_part_of_a_header(tiny, tmp_path):
    items = [Item("x" * 500, "k" * 500, i.open, "c" * 2000) for i in coloured(50, "a")]
    store = encoded(iter(items), tiny, tmp_path)
    path = tmp_path / data.chunk_name(0, 0)
    with open(path, "rb") as file:
        assert int.from_bytes(file.read(8), "little") < 1000
    assert store.captions(numbers_of(store)[17:19]) == ["c" * 2000] * 2
