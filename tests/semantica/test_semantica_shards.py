"""Tars of pages: samples in any order, damaged, cut or without a page, and kills in the middle."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from guidekit.errors import GuidekitError
from guidekit.semantica.data import Store
from guidekit.semantica.scattered import is_scattered
from guidekit.semantica.sources import Part, shard_items, shard_parts
from semantica_tiny import SIZE, encoded, encoder, firsts, numbers_of, pages_of


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


def test_shards_by_label_and_without_the_column(shards, tiny, tmp_path):
    with pytest.raises(GuidekitError, match="000.json lacks 'label'; it has page_url, url"):
        next(shard_items(shards, "label"))
    shard(tmp_path / "l.tar", {str(i): sample("red", "x", label=i % 2) for i in range(4)})
    assert [i.page for i in shard_items([tmp_path / "l.tar"], "label")] == ["0", "1", "0", "1"]


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
