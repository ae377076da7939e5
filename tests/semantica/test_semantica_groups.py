"""Pages out of encoded rows: which images are drawn together, how often, by how many processes."""

import functools
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from guidekit.errors import GuidekitError
from guidekit.seeds import shuffled
from guidekit.semantica import data, groups
from guidekit.semantica.data import Store
from guidekit.semantica.episodes import Episodes
from guidekit.semantica.groups import find_pairs
from guidekit.semantica.pairs import bounds_at
from guidekit.semantica.sources import Item, scene_items, scene_parts
from semantica_tiny import SIZE, all_pairs, coloured, encoded, encoder, numbers_of, pages_of


@pytest.fixture(scope="module")
def tiny():
    return encoder()


@pytest.fixture(scope="module")
def pages(tiny, tmp_path_factory):
    return encoded(scene_items(12, 3, SIZE), tiny, tmp_path_factory.mktemp("p"), chunk=10)


def test_filter_keeps_pairs_by_cosine(pages):
    everything = find_pairs(pages, None, None)
    assert everything.total == everything.kept == 12 * 3
    assert everything.share == 1
    numbers, page = numbers_of(pages), pages_of(pages)
    unit = torch.nn.functional.normalize(pages.rows(numbers, "pooled")[0].float(), dim=1)
    cosine = unit @ unit.T
    middle = float(cosine[torch.triu_indices(36, 36, 1).unbind()].median())
    some = find_pairs(pages, middle, 2.0)
    pairs = all_pairs(Episodes(pages))
    assert len(pairs) == 2 * some.kept
    places = [(numbers.index(a), numbers.index(b)) for a, b in pairs]
    assert all(page[a] == page[b] and a != b for a, b in places)
    assert all(cosine[a, b] >= middle - 1e-6 for a, b in places)
    said = json.loads((pages.folder / "filter/filter.json").read_text())
    assert said["share"] == some.share
    assert sum(said["histogram"]) == 36
    assert Image.open(pages.folder / "filter/histogram.png").size == (800, 288)
    with pytest.raises(GuidekitError, match="give other bounds or quantiles"):
        find_pairs(pages, 1.5, 2.0)


def test_pages_of_one_image_say_what_a_page_is(tiny, tmp_path):
    lonely = [item for page in "abc" for item in coloured(1, page)]
    pages = encoded(iter(lonely), tiny, tmp_path)
    with pytest.raises(GuidekitError, match=r"none of the pages has two images \(3 images\)"):
        find_pairs(pages, None, None)


def test_a_cut_list_of_pages_is_named(tiny, tmp_path):
    encoded(iter(coloured(2, "a")), tiny, tmp_path / "p")
    (tmp_path / "p/pages.json").write_text('{"encoder":')
    with pytest.raises(GuidekitError, match="p/pages.json is not readable JSON"):
        encoded(iter(coloured(2, "a")), tiny, tmp_path / "p")


def test_every_picture_of_a_large_page_is_paired(tiny, tmp_path):
    """Within groups, as pairs grow with the square."""
    colours = [(i, 255 - i, 90) for i in range(150)]
    items = (
        Item("class", str(c), functools.partial(Image.new, "RGB", (16, 16), c)) for c in colours
    )
    pages = encoded(items, tiny, tmp_path)
    result = find_pairs(pages, None, None, out=tmp_path / "filter")
    pairs = all_pairs(Episodes(pages, tmp_path / "filter"))
    assert sorted({row for pair in pairs for row in pair}) == numbers_of(pages)
    assert result.kept == result.total == 3 * 50 * 49 / 2


def test_filter_by_quantiles(pages):
    found = find_pairs(pages, quantiles=(0.25, 0.75))
    assert 0.3 < found.share < 0.75
    assert found.low < found.high
    counts = np.zeros(200, int)
    counts[[20, 100, 180]] = 10
    low, high = bounds_at(counts, (0.4, 0.6))
    assert low <= 0.01 <= high
    assert low > -0.7
    assert high < 0.7
    assert bounds_at(counts, (0.0, 1.0))[0] == -1


def test_quantiles_keep_no_copies(tiny, tmp_path):
    """However many there are."""
    items = [
        Item(str(page), str(place), functools.partial(Image.new, "RGB", (16, 16), colour))
        for page in range(5)
        for place, colour in enumerate([(50 * page, 9, 90), (50 * page, 9, 90), (0, 99, 200)])
    ]
    pages = encoded(iter(items), tiny, tmp_path)
    assert find_pairs(pages, None, None).kept == 15
    found = find_pairs(pages, quantiles=(0.0, 1.0))
    left = all_pairs(Episodes(pages))
    first, copy, other = numbers_of(pages)[:3]
    assert found.kept == 10
    assert (first, copy) not in left
    assert (first, other) in left


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_the_shuffle_is_a_permutation(count):
    orders = [[shuffled(i, count, key) for i in range(count)] for key in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count == 1000:
        places = np.array(orders)
        assert abs(np.corrcoef(places)[np.triu_indices(3, 1)]).max() < 0.1
        assert abs(np.corrcoef(places[0], np.arange(count))[0, 1]) < 0.1


def test_every_page_comes_once_an_epoch_in_another_order(pages):
    find_pairs(pages, None, None)
    episodes, page = Episodes(pages), dict(zip(numbers_of(pages), pages_of(pages), strict=True))
    n = len(episodes)
    assert n == 12
    epochs = [[episodes.pair(i) for i in range(e * n, e * n + n)] for e in range(3)]
    for drawn in epochs:
        assert sorted(page[a] for a, _ in drawn) == sorted(set(page.values()))
        assert all(page[a] == page[b] and a != b for a, b in drawn)
    assert epochs[0] != epochs[1]
    assert epochs[0][3] == episodes.pair(3)
    states, pixels = episodes.batch(range(4))
    assert states.shape == (4, 5, 16)
    assert pixels.shape == (4, 3, SIZE, SIZE)
    assert episodes.batch(range(4), "pooled")[0].shape == (4, 1, 16)
    with pytest.raises(GuidekitError, match="find_pairs makes them"):
        Episodes(pages, pages.folder / "nothing")


def test_pages_are_drawn_uniformly_whatever_their_size(tiny, tmp_path):
    """The paper's 4.1: an episode, then an image of it and another."""
    items = [item for n in range(30) for item in coloured(2, f"small {n}")]
    pages = encoded(iter(items + coloured(100, "large")), tiny, tmp_path)
    find_pairs(pages, None, None)
    episodes, large = Episodes(pages), set(numbers_of(pages)[60:])
    drawn = [episodes.pair(n) for n in range(31 * 200)]
    of_large = [pair for pair in drawn if pair[0] in large]
    assert len(of_large) == 200
    assert {second for _, second in of_large} <= large
    # Within it every image is as likely as another: 200 draws of 100 images.
    assert len({first for first, _ in of_large}) > 70


def test_an_image_and_its_partner_are_drawn_uniformly(tiny, tmp_path):
    pages = encoded(iter(coloured(4, "a")), tiny, tmp_path)
    find_pairs(pages, None, None)
    drawn = [Episodes(pages).pair(n) for n in range(2400)]
    counts = np.unique(np.array(drawn), axis=0, return_counts=True)[1]
    assert len(counts) == 12
    assert counts.min() > 140
    assert counts.max() < 260


def test_partners_are_those_within_the_bounds(tiny, tmp_path):
    """Also where some images have none, in groups of several sizes and over several partitions."""
    rng, items = np.random.default_rng(0), []
    for n, size in enumerate([2, 3, 5, 64, 65, 130] * 3):
        for i in range(size):
            noise = rng.integers(0, 256, (16, 16, 3), np.uint8)
            items.append(Item(str(n), f"{n}/{i}", functools.partial(Image.fromarray, noise)))
    pages = encoded(iter(items), tiny, tmp_path)
    numbers, page = numbers_of(pages), pages_of(pages)
    unit = torch.nn.functional.normalize(pages.rows(numbers, "pooled")[0].float(), dim=1).numpy()
    low, high = np.quantile(unit @ unit.T, [0.3, 0.6])
    found = find_pairs(pages, float(low), float(high))
    got = set(all_pairs(Episodes(pages)))
    assert len(got) == 2 * found.kept > 100
    small = {p for p in set(page) if page.count(p) <= 64}
    place = {n: i for i, n in enumerate(numbers)}
    cosine = unit @ unit.T
    expected = {
        (a, b)
        for a in numbers
        for b in numbers
        if a != b and page[place[a]] == page[place[b]] and page[place[a]] in small
        if low <= cosine[place[a], place[b]] <= high
    }
    assert {p for p in got if page[place[p[0]]] in small} == expected
    for a, b in got:
        assert page[place[a]] == page[place[b]]
        assert (b, a) in got
        assert low - 1e-5 <= cosine[place[a], place[b]] <= high + 1e-5


def test_partitions_change_no_pair(pages, monkeypatch, tmp_path):
    one = find_pairs(pages, quantiles=(0.1, 0.8), out=tmp_path / "one")
    monkeypatch.setattr(groups, "ROWS", 4)
    monkeypatch.setattr(groups, "BUFFER", 200)
    many = find_pairs(pages, quantiles=(0.1, 0.8), out=tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 16
    assert one == many
    first, second = (all_pairs(Episodes(pages, tmp_path / n)) for n in ("one", "many"))
    assert sorted(first) == sorted(second)


def test_processes_share_the_parts_and_the_partitions(tiny, tmp_path, monkeypatch):
    """As one alone: threads stand for processes and a barrier for how they wait."""
    monkeypatch.setattr(groups, "ROWS", 8)
    parts = scene_parts(24, 3, SIZE, each=2)
    alone = encoded(parts, tiny, tmp_path / "alone", chunk=4)
    asked = find_pairs(alone, quantiles=(0.1, 0.9), out=tmp_path / "f1")
    barrier, together = threading.Barrier(3), []

    def rank(number):
        how = dict(process=number, processes=3, first=number == 0)
        ranks = groups.Ranks(number, 3, barrier.wait)
        store = share(parts, tiny, tmp_path / "shared", barrier, **how)
        together.append(find_pairs(store, quantiles=(0.1, 0.9), out=tmp_path / "f3", ranks=ranks))

    def share(parts, encoder, folder, barrier, first, **how):
        how = data.Encoding(encoder.copied(), SIZE, chunk=4, **how)
        if first:
            data.begin(folder, how.facts())
        barrier.wait()
        data.write_pages(parts, how, folder, first=False)
        barrier.wait()
        return Store(folder)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.kept for found in together] == [asked.kept] * 3
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("alone", "shared")]
    assert names[0] == names[1]
    for name in names[0][:-1]:
        one, other = (load_file(tmp_path / n / name) for n in ("alone", "shared"))
        assert all(torch.equal(one[k], other[k]) for k in one)
    shared = Store(tmp_path / "shared")
    assert sorted(all_pairs(Episodes(shared, tmp_path / "f3"))) == sorted(
        all_pairs(Episodes(alone, tmp_path / "f1"))
    )
