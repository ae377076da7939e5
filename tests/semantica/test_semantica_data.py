"""Encoders, sources, the cache of encoded pages and the filter of pairs."""

import functools
import io
import json
import os
import tarfile
import weakref

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from guidekit.references import load_reference, square
from guidekit.semantica import data
from guidekit.semantica.data import Store
from guidekit.semantica.encode import (
    CLIP_CONFIG,
    CLIP_WEIGHTS,
    ImageEncoder,
    from_timm,
    load_encoder,
)
from guidekit.semantica.episodes import Episodes
from guidekit.semantica.groups import find_pairs
from guidekit.semantica.scattered import is_scattered
from guidekit.semantica.sources import (
    Item,
    Part,
    folder_items,
    folder_parts,
    labelled_scene_items,
    scene_items,
    shard_items,
    shard_parts,
)
from semantica_tiny import SIZE, coloured, encoded, encoder, numbers_of, pages_of
from semantica_tiny import pipeline as semantica_pipeline


@pytest.fixture(scope="module")
def tiny():
    return encoder()


def jpeg(colour, size=(24, 20)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "jpeg")
    return out.getvalue()


def shard(path, samples: dict[str, dict[str, bytes]]) -> None:
    """A tar as img2dataset writes it."""
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def sample(colour, page, caption="an image", **columns) -> dict[str, bytes]:
    table = json.dumps({"page_url": page, "url": "x", **columns}).encode()
    return {"jpg": jpeg(colour), "json": table, "txt": caption.encode()}


def firsts(pages) -> list[int]:
    """For every row the first row of its page."""
    found = pages_of(pages)
    return [found.index(page) for page in found]


@pytest.fixture
def shards(tmp_path):
    """Two pages in two shards; one image is damaged, one has no page, one sample no image."""
    folder = tmp_path / "shards"
    folder.mkdir()
    broken = sample("blue", "a")
    broken["jpg"] = broken["jpg"][:50]
    lost = sample("blue", "a") | {"json": b"{}"}
    bare = {"json": json.dumps({"page_url": "b"}).encode()}
    shard(folder / "00000.tar", {"000": sample("red", "a"), "001": broken, "002": lost})
    shard(
        folder / "00001.tar",
        {
            "010": sample("green", "b"),
            "011": bare,
            "012": sample("pink", "a", "é"),
            "013": sample("white", "b"),
        },
    )
    return sorted(folder.glob("*.tar"))


def test_shards_are_grouped_by_page_and_what_is_damaged_is_counted(shards, tiny, tmp_path):
    pages = encoded(shard_items(shards), tiny, tmp_path / "pages")
    assert pages.totals() == {"rows": 4, "seen": 7, "unreadable": 3}
    assert firsts(pages) == [0, 1, 0, 1]
    assert pages.captions([0, 2]) == ["an image", "é"]
    pictures, tokens, pooled = pages.rows([2, 0], "pictures", "tokens", "pooled")
    assert pictures.shape == (2, 3, SIZE, SIZE)
    assert pictures.dtype == torch.uint8
    assert tokens.shape == (2, 5, 16)
    assert pooled.shape == (2, 16)
    pink = torch.tensor([255.0, 192, 203]).view(3, 1, 1)
    assert (pictures[0] - pink).abs().max() < 6
    expected, _ = tiny(pictures.float() / 127.5 - 1)
    torch.testing.assert_close(tokens.float(), expected, atol=2e-3, rtol=2e-3)


def test_a_cut_shard_is_skipped_from_where_it_is_cut(shards, tiny, tmp_path):
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    pages = encoded(shard_items(shards), tiny, tmp_path / "pages")
    assert 1 <= len(pages) < 4
    assert pages.totals()["unreadable"] >= 3


@pytest.mark.parametrize("damage", ["header", "boundary"])
def test_a_shard_that_ends_too_soon_is_counted(damage, tmp_path):
    """tarfile takes a damaged header, or none, for the end of the archive."""
    path = tmp_path / "0.tar"
    shard(path, {f"{i:03}": sample("red", "a") for i in range(6)})
    whole = bytearray(path.read_bytes())
    place = whole.index(b"003.jpg")
    whole[place + 148 : place + 156] = b"damaged!"  # the checksum
    path.write_bytes(whole if damage == "header" else whole[:place])
    found = list(shard_items([path]))
    assert [item and item.key for item in found] == ["0.tar/000", "0.tar/001", "0.tar/002", None]


def by_extension(path, samples, cut=0):
    """A tar whose members are sorted by extension, without its last `cut` bytes."""
    with tarfile.open(path, "w") as tar:
        for kind in sorted({kind for parts in samples.values() for kind in parts}):
            for key, parts in samples.items():
                if kind in parts:
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(parts[kind])
                    tar.addfile(member, io.BytesIO(parts[kind]))
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])


def test_shards_sorted_by_extension_are_read(tmp_path):
    """Members of a sample belong together wherever they stand, and places are numbers."""
    samples = {f"{i:03d}": sample("red", f"p{i // 2}", f"text {i}") for i in range(6)}
    samples["003"].pop("json")  # one without a page is counted, as elsewhere
    by_extension(tmp_path / "0.tar", samples)
    shard(tmp_path / "1.tar", samples)
    found, expected = (list(shard_items([tmp_path / f"{i}.tar"])) for i in (0, 1))
    facts = [
        [
            item and (item.page, item.key.split("/")[1], item.caption, item.open().tobytes())
            for item in items
        ]
        for items in (found, expected)
    ]
    assert facts[0] == facts[1]
    assert facts[0][3] is None
    assert facts[0][2][:3] == ("p1", "002", "text 2")
    (part,) = shard_parts([tmp_path / "0.tar"])
    places = [place for _, place in part.items(0)]
    for skip in (1, 4, 6):
        rest = [item and item.key for item, _ in part.items(places[skip - 1])]
        assert rest == [item and item.key for item in found][skip:]


def test_a_cut_shard_sorted_by_extension_keeps_what_is_whole(tmp_path):
    samples = {str(i): sample("red", "p") for i in range(3)}
    by_extension(tmp_path / "0.tar", samples)
    with tarfile.open(tmp_path / "0.tar") as tar:
        last = next(m for m in tar if m.name == "2.json")
    data = (tmp_path / "0.tar").read_bytes()
    for cut in (last.offset + 100, last.offset_data + 5):  # in the header, in what it holds
        (tmp_path / "0.tar").write_bytes(data[:cut])
        found = list(shard_items([tmp_path / "0.tar"]))
        assert [item and item.key for item in found] == ["0.tar/0", "0.tar/1", None, None]


def test_pictures_alone_are_not_sorted_by_extension(tmp_path):
    """Nor is a tar of one sample; both are streamed."""
    for count in (1, 3):
        samples = {str(i): {"jpg": jpeg("red")} for i in range(count)}
        by_extension(tmp_path / "0.tar", samples)
        assert not is_scattered(tmp_path / "0.tar")
    by_extension(tmp_path / "0.tar", {str(i): sample("red", "p") for i in range(2)})
    assert is_scattered(tmp_path / "0.tar")


def test_samples_without_a_page_are_counted_wherever_they_stand(tmp_path):
    pages = (None, "a", "", float("nan"), "a")
    samples = {str(i): sample("red", page) for i, page in enumerate(pages)}
    shard(tmp_path / "0.tar", {"-": {"jpg": jpeg("red"), "json": b"5"}} | samples)
    assert [item and item.page for item in shard_items([tmp_path / "0.tar"])] == [
        None,
        None,
        "a",
        None,
        None,
        "a",
    ]


def test_names_in_shards_may_have_dots_in_their_folders(tiny, tmp_path):
    """As `tar cf x.tar .` writes them."""
    red, blue = sample("red", "a"), sample("blue", "a")
    shard(tmp_path / "0.tar", {"./000": red, "./001": blue, "laion.v1/000": red})
    keys = [item.key for item in shard_items([tmp_path / "0.tar"])]
    assert keys == ["0.tar/./000", "0.tar/./001", "0.tar/laion.v1/000"]


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


def test_shards_by_label_and_without_the_column(shards, tiny, tmp_path):
    with pytest.raises(ValueError, match="000.json lacks 'label'; it has page_url, url"):
        next(shard_items(shards, "label"))
    shard(tmp_path / "l.tar", {str(i): sample("red", "x", label=i % 2) for i in range(4)})
    assert [i.page for i in shard_items([tmp_path / "l.tar"], "label")] == ["0", "1", "0", "1"]


def test_folders_are_pages(tiny, tmp_path):
    root = tmp_path / "in"
    for name in ("cats/a.jpg", "cats/b.png", "dogs/c.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("LA" if name.endswith("png") else "L", (9, 30), 128).save(root / name)
    (root / "dogs/d.jpg").write_bytes(b"no image")
    pages = encoded(folder_items(root), tiny, tmp_path / "pages")
    assert firsts(pages) == [0, 0, 2]
    assert pages.totals()["unreadable"] == 1
    with pytest.raises(ValueError, match="no images below"):
        next(folder_items(tmp_path / "pages"))
    Image.new("L", (9, 9)).save(root / "loose.png")
    for most in (1, 256):  # of parts
        found = [item for part in folder_parts(root, most=most) for item, _ in part.items(0)]
        assert {i.key for i in found} == {i.key for i in folder_items(root)}
    with pytest.raises(ValueError, match="no images below"):
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
    with pytest.raises(ValueError, match="was begun with"):
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
        with pytest.raises(ValueError, match="none of 2 images could be read"):
            find_pairs(encoded(broken(), tiny, tmp_path / "none"))
    with pytest.raises(ValueError, match="no images below"):
        encoded(folder_items(tmp_path / "typo"), tiny, tmp_path / "p", facts={"data": 1})
    pages = encoded(scene_items(2, 2, SIZE), tiny, tmp_path / "p", facts={"data": 2})
    assert len(pages) == 4


def test_an_encoder_of_other_weights_is_another(tiny, tmp_path):
    other = tiny.copied()
    next(other.parameters()).data += 1
    assert other.source == tiny.source
    assert tiny.copied().fingerprint() == tiny.fingerprint()
    encoded(scene_items(2, 2, SIZE), tiny, tmp_path)
    with pytest.raises(ValueError, match="begun with weights '.*', not '.*'; give another folder"):
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


def test_a_killed_tar_goes_on_at_its_byte_and_reads_nothing_twice(tiny, tmp_path, monkeypatch):
    path = tmp_path / "0.tar"
    shard(path, {f"{i:03}": sample("red", f"{i // 2}") for i in range(40)})
    (part,) = shard_parts([path])

    class Killed(Exception):
        pass

    def until(place):
        for number, found in enumerate(part.items(place)):
            if number == 30:
                raise Killed
            yield found

    with pytest.raises(Killed):
        encoded([Part("0.tar", until)], tiny, tmp_path / "p", chunk=8)
    assert Store(tmp_path / "p").state(0)["rows"] == 24
    read, extract = [], tarfile.TarFile.extractfile
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda tar, m: read.append(m.name) or extract(tar, m)
    )
    again = encoded([part], tiny, tmp_path / "p", chunk=8)
    assert read[0] == "024.jpg"
    assert len(read) == 16 * 3
    assert again.totals() == {"rows": 40, "seen": 40, "unreadable": 0}
    whole = encoded([part], tiny, tmp_path / "whole", chunk=8)
    assert pages_of(again) == pages_of(whole)
    assert numbers_of(again) == numbers_of(whole)
    read.clear()
    encoded([part], tiny, tmp_path / "p", chunk=8)
    assert not read  # finished


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


def test_open_clip_folders_and_saving(tmp_path):
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    model = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    clip = open_clip.CLIP(12, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
    table = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / CLIP_CONFIG).write_text(json.dumps(table))
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / CLIP_WEIGHTS)
    encoder = load_encoder(tmp_path)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens, pooled = encoder(pixels)
    assert encoder.shapes() == (4, 16, 12)
    assert tokens.shape == (2, 4, 16)
    torch.testing.assert_close(pooled, clip.eval().encode_image(pixels))
    encoder.save_pretrained(tmp_path / "saved")
    again = load_encoder(tmp_path / "saved")
    assert torch.equal(again(pixels)[0], tokens)
    assert again.source == str(tmp_path)


def test_timm_convolutions_and_windows_have_tokens_too():
    encoder = from_timm("test_resnet", pretrained=False)
    tokens, channels, pooled = encoder.shapes()
    assert tokens > 1
    assert channels == pooled
    windows = dict(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
    swin = from_timm("swin_tiny_patch4_window7_224", pretrained=False, **windows)
    assert swin.shapes() == (4 * 4, 16, 16)


@pytest.mark.parametrize(
    "vision, tokens",
    [
        (dict(layers=[1, 1, 1, 1], width=8, head_width=32, image_size=64), (4, 256)),
        (dict(timm_model_name="test_vit", timm_pool="avg", image_size=160), (101, 64)),
        (dict(timm_model_name="test_convnext", timm_pool="", image_size=64), (4, 64)),
    ],
    ids=["resnet", "timm-vit", "timm-convnext"],
)
def test_every_tower_of_open_clip_has_tokens(vision, tokens):
    mean = (0.5,) * 3
    settings = {"embed_dim": 12, "vision_cfg": vision}
    encoder = ImageEncoder("open_clip", "", settings, vision["image_size"], mean, mean)
    assert encoder.shapes() == (*tokens, 12)
    pixels = torch.rand(2, 3, vision["image_size"], vision["image_size"]) * 2 - 1
    torch.testing.assert_close(encoder(pixels)[1], encoder.net(pixels))


def test_unknown_encoders():
    with pytest.raises(ValueError, match="there are dinov2-b, dinov2-l, siglip-b"):
        load_encoder("dino")
    with pytest.raises(ValueError, match="timm has no model"):
        load_encoder("timm/vit_of_nobody")
    with pytest.raises(ValueError, match="open_clip has no model"):
        load_encoder("open_clip/ViT-of-nobody/tag")
    with pytest.raises(
        ValueError, match="no weights 'test_vit.nope'; there are test_vit.r160_in1k"
    ):
        load_encoder("timm/test_vit.nope")
    with pytest.raises(ValueError, match="no weights 'nope' of RN50; there are openai"):
        load_encoder("open_clip/RN50/nope")
