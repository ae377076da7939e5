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
from safetensors.torch import load_file, save_file

from guidekit.references import load_reference, square
from guidekit.semantica import data
from guidekit.semantica.data import Pages, write_pages
from guidekit.semantica.encode import (
    CLIP_CONFIG,
    CLIP_WEIGHTS,
    ImageEncoder,
    from_timm,
    load_encoder,
)
from guidekit.semantica.pairs import Episodes, bounds_at, find_pairs, shuffled
from guidekit.semantica.sources import (
    Item,
    folder_items,
    labelled_scene_items,
    scene_items,
    shard_items,
)
from semantica_tiny import SIZE, encoder
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


def sample(colour, page, caption="a picture", **columns) -> dict[str, bytes]:
    table = json.dumps({"page_url": page, "url": "x", **columns}).encode()
    return {"jpg": jpeg(colour), "json": table, "txt": caption.encode()}


def firsts(pages) -> list[int]:
    """For every row the first row of its page."""
    return [pages.page.tolist().index(page) for page in pages.page]


def all_pairs(episodes) -> list[tuple[int, int]]:
    return [episodes.pair(number) for number in range(len(episodes))]


@pytest.fixture
def shards(tmp_path):
    """Two pages in two shards; one picture is damaged, one has no page, one sample no picture."""
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
    pages = write_pages(shard_items(shards), tiny, tmp_path / "pages", SIZE)
    assert len(pages) == 4 and pages.unreadable == 3
    assert firsts(pages) == [0, 1, 0, 1]
    assert pages.captions([0, 2]) == ["a picture", "é"]
    assert sorted(rows.tolist() for rows in pages.members()) == [[0, 2], [1, 3]]
    pictures, tokens, pooled = pages.rows([2, 0], "pictures", "tokens", "pooled")
    assert pictures.shape == (2, 3, SIZE, SIZE) and pictures.dtype == torch.uint8
    assert tokens.shape == (2, 5, 16) and pooled.shape == (2, 16)
    pink = torch.tensor([255.0, 192, 203]).view(3, 1, 1)
    assert (pictures[0] - pink).abs().max() < 6
    expected, _ = tiny(pictures.float() / 127.5 - 1)
    torch.testing.assert_close(tokens.float(), expected, atol=2e-3, rtol=2e-3)


def test_a_cut_shard_is_skipped_from_where_it_is_cut(shards, tiny, tmp_path):
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    pages = write_pages(shard_items(shards), tiny, tmp_path / "pages", SIZE)
    assert 1 <= len(pages) < 4 and pages.unreadable >= 3


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

    write_pages(items(), tiny, tmp_path / "pages", SIZE, shard=6)
    assert len(count) == 6 and max(count) <= 1


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
    (root / "dogs/d.jpg").write_bytes(b"no picture")
    pages = write_pages(folder_items(root), tiny, tmp_path / "pages", SIZE)
    assert firsts(pages) == [0, 0, 2]
    assert pages.unreadable == 1
    with pytest.raises(ValueError, match="no pictures below"):
        next(folder_items(tmp_path / "pages"))


def test_encoding_goes_on_where_it_was_killed(tiny, tmp_path):
    class Killed(Exception):
        pass

    def until(last):
        for number, item in enumerate(scene_items(6, 2, SIZE)):
            if number == last:
                raise Killed
            yield item

    whole = write_pages(until(None), tiny, tmp_path / "whole", SIZE, shard=5)
    with pytest.raises(Killed):
        write_pages(until(8), tiny, tmp_path / "cut", SIZE, shard=5)
    assert len(Pages(tmp_path / "cut")) == 5  # one whole shard
    opened = []

    def watched():
        for item in scene_items(6, 2, SIZE):
            opened.append(item.key)
            yield item

    again = write_pages(watched(), tiny, tmp_path / "cut", SIZE, shard=5)
    assert len(again) == len(whole) == 12 and len(again.shards) == 3
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            again.rows(range(12), "pictures", "tokens"),
            whole.rows(range(12), "pictures", "tokens"),
            strict=True,
        )
    )
    opened.clear()
    write_pages(watched(), tiny, tmp_path / "cut", SIZE, shard=5)
    assert not opened  # finished
    with pytest.raises(ValueError, match="was begun with"):
        write_pages(watched(), tiny, tmp_path / "cut", 8)


def test_a_kill_while_a_shard_is_written_loses_that_shard_alone(tiny, tmp_path, monkeypatch):
    def dying(source, target):
        if target.name == "00001.safetensors":
            raise InterruptedError
        os.rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(data.os, "replace", dying)
        write_pages(scene_items(6, 2, SIZE), tiny, tmp_path, SIZE, shard=5)
    assert len(Pages(tmp_path)) == 5
    again = write_pages(scene_items(6, 2, SIZE), tiny, tmp_path, SIZE, shard=5)
    assert firsts(again) == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]


def test_the_encoder_sees_pictures_at_its_own_size(tmp_path):
    """As it sees a reference when it draws: small pictures are not what is encoded."""
    pipe = semantica_pipeline(sample_size=8)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    shown = Image.fromarray(pixels)
    items = iter([Item("a", "0", shown.copy)])
    tokens, pictures = write_pages(items, pipe.encoder, tmp_path, 8).rows([0], "tokens", "pictures")
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
    assert seen[1, :8].max() < 30 and seen[1, 12:].min() > 225  # red above white
    picture = load_reference(tmp_path / "a.jpg").picture
    assert torch.equal(square(picture, 20), seen)
    deep = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    grey = square(Image.fromarray(deep), 16)
    assert (grey[0] - torch.tensor(deep >> 8).to(torch.uint8)).abs().max() == 0


def test_nothing_is_begun_by_what_cannot_work(tiny, tmp_path):
    def broken():
        yield from (None, None)

    for _ in range(2):
        with pytest.raises(ValueError, match="none of 2 pictures could be read"):
            write_pages(broken(), tiny, tmp_path / "none", SIZE)
    with pytest.raises(ValueError, match="no pictures below"):
        write_pages(folder_items(tmp_path / "typo"), tiny, tmp_path / "p", SIZE, facts={"data": 1})
    pages = write_pages(scene_items(2, 2, SIZE), tiny, tmp_path / "p", SIZE, facts={"data": 2})
    assert len(pages) == 4


def test_an_encoder_of_other_weights_is_another(tiny, tmp_path):
    other = tiny.copied()
    next(other.parameters()).data += 1
    assert other.source == tiny.source and tiny.copied().fingerprint() == tiny.fingerprint()
    write_pages(scene_items(2, 2, SIZE), tiny, tmp_path, SIZE)
    with pytest.raises(ValueError, match="begun with weights '.*', not '.*'; give another folder"):
        write_pages(scene_items(2, 2, SIZE), other, tmp_path, SIZE)


def test_one_shard_of_pictures_is_all_that_is_in_memory(tiny, tmp_path, monkeypatch):
    held, flush = [], data._Writer.flush

    def watched(self, last):
        held.append(len(self.pictures))
        flush(self, last)

    monkeypatch.setattr(data._Writer, "flush", watched)
    write_pages(scene_items(5, 2, SIZE), tiny, tmp_path, SIZE, shard=4)
    assert held == [4, 4, 2]


def test_scenes_share_what_a_page_shares():
    by_page = {}
    for item in scene_items(4, 3, SIZE):
        by_page.setdefault(item.page, set()).add(item.caption)
    assert len(by_page) == 4 and all(len(captions) == 1 for captions in by_page.values())
    polluted = list(scene_items(40, 3, SIZE, polluted=0.5))
    own = [i.caption for i in scene_items(40, 3, SIZE)]
    changed = np.mean([a.caption != b for a, b in zip(polluted, own, strict=True)])
    assert 0.35 < changed < 0.65
    labels = {item.page for item in labelled_scene_items(20, 2, SIZE)}
    assert all(len(label.split()) == 2 for label in labels) and len(labels) > 5


@pytest.fixture(scope="module")
def pages(tiny, tmp_path_factory):
    return write_pages(scene_items(12, 3, SIZE), tiny, tmp_path_factory.mktemp("p"), SIZE, shard=10)


def test_filter_keeps_pairs_by_cosine(pages):
    everything = find_pairs(pages, None, None)
    assert everything.total == everything.kept == 12 * 3 and everything.share == 1
    unit = torch.nn.functional.normalize(pages.rows(range(36), "pooled")[0].float(), dim=1)
    cosine = unit @ unit.T
    middle = float(cosine[torch.triu_indices(36, 36, 1).unbind()].median())
    some = find_pairs(pages, middle, 2.0)
    pairs = all_pairs(Episodes(pages))
    assert len(pairs) == 2 * some.kept
    assert all(pages.page[a] == pages.page[b] and a != b for a, b in pairs)
    assert all(cosine[a, b] >= middle - 1e-6 for a, b in pairs)
    said = json.loads((pages.folder / "filter/filter.json").read_text())
    assert said["share"] == some.share and sum(said["histogram"]) == 36
    assert Image.open(pages.folder / "filter/histogram.png").size == (800, 288)
    with pytest.raises(ValueError, match="give other bounds or quantiles"):
        find_pairs(pages, 1.5, 2.0)


def test_every_picture_of_a_large_page_is_paired(tiny, tmp_path):
    """Within groups, as pairs grow with the square."""
    colours = [(i, 255 - i, 90) for i in range(150)]
    items = (
        Item("class", str(c), functools.partial(Image.new, "RGB", (16, 16), c)) for c in colours
    )
    pages = write_pages(items, tiny, tmp_path, SIZE)
    result = find_pairs(pages, None, None, out=tmp_path / "filter")
    pairs = all_pairs(Episodes(pages, tmp_path / "filter"))
    assert sorted({row for pair in pairs for row in pair}) == list(range(150))
    assert result.kept == result.total == 3 * 50 * 49 / 2


def test_filter_by_quantiles(pages):
    found = find_pairs(pages, quantiles=(0.25, 0.75))
    assert 0.3 < found.share < 0.75 and found.low < found.high
    counts = np.zeros(200, int)
    counts[[20, 100, 180]] = 10
    low, high = bounds_at(counts, (0.4, 0.6))
    assert low <= 0.01 <= high and low > -0.7 and high < 0.7
    assert bounds_at(counts, (0.0, 1.0))[0] == -1


def test_quantiles_keep_no_copies(tiny, tmp_path):
    """However many there are."""
    items = [
        Item(str(page), str(place), functools.partial(Image.new, "RGB", (16, 16), colour))
        for page in range(5)
        for place, colour in enumerate([(50 * page, 9, 90), (50 * page, 9, 90), (0, 99, 200)])
    ]
    pages = write_pages(iter(items), tiny, tmp_path, SIZE)
    assert find_pairs(pages, None, None).kept == 15
    found = find_pairs(pages, quantiles=(0.0, 1.0))
    assert found.kept == 10 and (0, 1) not in all_pairs(Episodes(pages))


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_the_shuffle_is_a_permutation(count):
    orders = [[shuffled(i, count, key) for i in range(count)] for key in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count == 1000:
        places = np.array(orders)
        assert abs(np.corrcoef(places)[np.triu_indices(3, 1)]).max() < 0.1
        assert abs(np.corrcoef(places[0], np.arange(count))[0, 1]) < 0.1


def test_episodes_visit_every_pair_once_an_epoch(pages):
    find_pairs(pages, None, None)
    episodes = Episodes(pages)
    n = len(episodes)
    first = all_pairs(episodes)
    kept = load_file(pages.folder / "filter/pairs.safetensors")["pairs"]
    assert sorted(first) == sorted(map(tuple, kept.tolist()))
    second = [episodes.pair(i) for i in range(n, 2 * n)]
    assert first != second and first[3] == episodes.pair(3)
    states, pixels = episodes.batch(range(4))
    assert states.shape == (4, 5, 16) and pixels.shape == (4, 3, SIZE, SIZE)
    assert episodes.batch(range(4), "pooled")[0].shape == (4, 1, 16)
    with pytest.raises(ValueError, match="find_pairs makes them"):
        Episodes(pages, pages.folder / "nothing")


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
    assert encoder.shapes() == (4, 16, 12) and tokens.shape == (2, 4, 16)
    torch.testing.assert_close(pooled, clip.eval().encode_image(pixels))
    encoder.save_pretrained(tmp_path / "saved")
    again = load_encoder(tmp_path / "saved")
    assert torch.equal(again(pixels)[0], tokens) and again.source == str(tmp_path)


def test_timm_convolutions_and_windows_have_tokens_too():
    encoder = from_timm("test_resnet", pretrained=False)
    tokens, channels, pooled = encoder.shapes()
    assert tokens > 1 and channels == pooled
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
