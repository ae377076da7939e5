"""From encoded rows to pages: dealt by a hash into partitions on disk, filtered one by one.

A partition holds about 65,000 rows whatever the number of all, so memory does not grow with it.
What stays of a page are its rows and, for each, which rows of the page may be drawn with it: one
bit each, in groups of 64. There is no table of pairs.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guidekit.errors import GuidekitError
from guidekit.images import save_image
from guidekit.semantica.columns import write_columns
from guidekit.semantica.data import Store
from guidekit.semantica.pairs import (
    COPY,
    FINE,
    Filtered,
    bounds_at,
    picture,
    request,
    save_filtered,
)

ROWS = 2**16  # of a partition, about
BUFFER = 2**24  # bytes of rows that are dealt at a time
MOST = 64  # rows that are paired with each other; a larger page is dealt into groups
BLOCK = 2**22  # numbers of the groups whose cosines are taken at a time
POWERS = np.uint64(1) << np.arange(MOST, dtype=np.uint64)


@dataclass(frozen=True)
class Ranks:
    """This process among those that group together, and how it waits for them."""

    process: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None


def partition_count(rows: int) -> int:
    """A power of two, so that a partition has about ROWS rows."""
    return 1 << max(0, (rows // ROWS).bit_length())


def find_pairs(
    store: Store,
    low: float | None = None,
    high: float | None = None,
    quantiles: tuple[float, float] | None = None,
    out: Path | None = None,
    parts: int | None = None,
    ranks: Ranks | None = None,
) -> Filtered:
    """Groups rows by page and writes which may be drawn together into `out`, by default `filter`.

    low, high: cosines to keep; None for no bound. quantiles: shares of all pairs that say them
    instead, copies apart. parts: the first that count, all by default. Every process of `ranks`
    calls it. Raises GuidekitError when no pair is left, and for quantiles beside low or high.
    """
    ranks = ranks or Ranks()
    totals = store.totals(parts)
    asked = request(store, totals, low, high, quantiles)
    out = store.folder / "filter" if out is None else Path(out)
    work, count = out / "dealt", partition_count(totals["rows"])
    if ranks.process == 0:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (out / "filter.json").unlink(missing_ok=True)  # it says that the rest is whole
    ranks.wait()
    _deal(store, parts, count, work, ranks)
    ranks.wait()
    mine = range(ranks.process, count, ranks.processes)
    counts = None
    if quantiles is not None:
        counts = sum((_histogram(_records(work, p)) for p in mine), np.zeros(FINE, np.int64))
        counts = _summed(work, "quantiles", counts, ranks)
        low, high = bounds_at(counts, quantiles)
        high = min(high, COPY)
    low, high = (-2.0 if low is None else low), (2.0 if high is None else high)
    found, kept, sizes = np.zeros(FINE, np.int64), 0, np.zeros(count, np.int64)
    for partition in mine:
        histogram, pages, pairs = _filter(_records(work, partition), low, high, out, partition)
        found, kept, sizes[partition] = found + histogram, kept + pairs, pages
    own = np.concatenate([found, [kept], sizes])
    counts, kept, sizes = np.split(_summed(work, "kept", own, ranks), [FINE, FINE + 1])
    result = Filtered(low, high, int(counts.sum()), int(kept[0]), asked)
    if ranks.process == 0:
        save_image(picture(counts, result), out / "histogram.png")
        if result.kept:
            save_filtered(out, result, counts, sizes.tolist(), totals["unreadable"])
            shutil.rmtree(work)
    ranks.wait()
    if not result.kept:
        raise GuidekitError(nothing_left(result, totals, out))
    return result


def nothing_left(result: Filtered, totals: dict[str, int], out: Path) -> str:
    """Why there is no pair, and what helps."""
    if not totals["rows"]:
        return f"none of {totals['seen']} images could be read"
    if not result.total:
        return (
            f"none of the pages has two images ({totals['rows']} images); a page is what shares a "
            "folder, or a value of the column that `page` names"
        )
    return (
        f"none of {result.total} pairs has a cosine from {result.low:g} to {result.high:g}; see "
        f"{out / 'histogram.png'}, and give other bounds or quantiles"
    )


def _kind(width: int) -> np.dtype:
    """A dealt row: its page, its number, its global feature."""
    return np.dtype([("page", "<i8"), ("row", "<i8"), ("pooled", "<f2", (width,))])


def _deal(store: Store, parts: int | None, count: int, work: Path, ranks: Ranks) -> None:
    """Appends this process's rows to a file for each partition."""
    waiting, size = [], 0
    for part in sorted(store.chunks):
        if part % ranks.processes != ranks.process or (parts is not None and part >= parts):
            continue
        for numbers, file in store.files(part):
            if not len(numbers):
                continue
            pooled = file.read("pooled")
            rows = np.empty(len(numbers), _kind(pooled.shape[1]))
            rows["page"], rows["row"], rows["pooled"] = file.read("page"), numbers, pooled
            waiting.append(rows)
            size += rows.nbytes
            if size >= BUFFER:
                _append(waiting, count, work, ranks)
                waiting, size = [], 0
    if waiting:
        _append(waiting, count, work, ranks)


def _append(waiting: list[np.ndarray], count: int, work: Path, ranks: Ranks) -> None:
    """Writes rows to the files of their partitions: the first bits of a page's number."""
    rows = np.concatenate(waiting)
    bits = count.bit_length() - 1
    place = rows["page"].view(np.uint64) >> np.uint64(64 - bits) if bits else np.zeros(len(rows))
    order = np.argsort(place, kind="stable")
    cuts = np.searchsorted(place[order], np.arange(count + 1))
    for partition in np.flatnonzero(np.diff(cuts)):
        part = rows[order[cuts[partition] : cuts[partition + 1]]]
        name = f"{partition:06d}-{ranks.process:04d}-{part.dtype['pooled'].shape[0]}"
        with open(work / name, "ab") as file:
            part.tofile(file)


def _records(work: Path, partition: int) -> np.ndarray:
    """All processes' rows of a partition, by page and number."""
    paths = sorted(work.glob(f"{partition:06d}-*"))
    if not paths:
        return np.empty(0, _kind(1))
    rows = np.concatenate([np.fromfile(p, _kind(int(p.name.rpartition("-")[2]))) for p in paths])
    return rows[np.lexsort((rows["row"], rows["page"]))]


def _groups(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Groups of one size at a time: the pages (n,) and the places of their rows (n, size).

    Of pages with two rows or more. One of more than MOST is dealt at random.
    """
    starts = np.concatenate([[0], np.flatnonzero(np.diff(rows["page"])) + 1])
    sizes = np.diff(np.concatenate([starts, [len(rows)]]))
    by_size: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for size in np.unique(sizes[(sizes > 1) & (sizes <= MOST)]):
        first = starts[sizes == size]
        by_size[int(size)] = [(rows["page"][first], first[:, None] + np.arange(size))]
    for first, size in zip(starts[sizes > MOST], sizes[sizes > MOST], strict=True):
        key = int(rows["row"][first])
        order = first + np.random.Generator(np.random.Philox(key=key)).permutation(size)
        for group in np.array_split(order, -(-size // MOST)):
            entry = (rows["page"][first : first + 1], group[None])
            by_size.setdefault(len(group), []).append(entry)
    for size in sorted(by_size):
        pages, places = (np.concatenate(x) for x in zip(*by_size[size], strict=True))
        width = size * (size + rows["pooled"].shape[1])
        for i in range(0, len(pages), max(1, BLOCK // width)):
            block = slice(i, i + max(1, BLOCK // width))
            yield pages[block], places[block]


def _cosines(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Cosines (n, size, size) between the global features of each group."""
    x = rows["pooled"][places].astype(np.float32)
    x /= np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return x @ x.transpose(0, 2, 1)


def _counted(cosines: np.ndarray) -> np.ndarray:
    """Number of pairs by cosine, (FINE,) from -1 to 1."""
    above = cosines[:, *np.triu_indices(cosines.shape[1], 1)]
    return np.histogram(above.clip(-1, 1), FINE, (-1, 1))[0]


def _histogram(rows: np.ndarray) -> np.ndarray:
    """Number of a partition's pairs by cosine (FINE,)."""
    counts = np.zeros(FINE, np.int64)
    for _, places in _groups(rows) if len(rows) else ():
        counts += _counted(_cosines(rows, places))
    return counts


def _filter(
    rows: np.ndarray, low: float, high: float, out: Path, partition: int
) -> tuple[np.ndarray, int, int]:
    """Writes a partition's pages; returns its histogram and the numbers of pages and pairs."""
    counts, found = np.zeros(FINE, np.int64), []
    for pages, places in _groups(rows) if len(rows) else ():
        cosines = _cosines(rows, places)
        counts += _counted(cosines)
        allowed = (cosines >= low) & (cosines <= high)
        allowed[:, np.arange(allowed.shape[1]), np.arange(allowed.shape[1])] = False
        found.append(_partners(pages, rows["row"][places], allowed))
    found.append([np.empty(0, t) for t in (np.int64, np.int64, np.uint64, np.uint8)])
    page, row, partners, place = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(page, kind="stable")  # a page's groups stay whole, one after another
    page = page[order]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(page)) + 1, [len(page)]])
    starts = starts if len(page) else np.zeros(1)
    path = out / f"{partition:06d}.safetensors"
    arrays = {"row": row[order], "partners": partners[order], "place": place[order]}
    pairs = int(np.bitwise_count(partners).sum()) // 2
    write_columns(path, arrays | {"start": starts.astype(np.int64)}, {"pages": len(starts) - 1})
    return counts, len(starts) - 1, pairs


def _partners(
    pages: np.ndarray, rows: np.ndarray, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Page, number, partners and place in the group of every row that has a partner.

    rows (n, size), allowed (n, size, size). Bit k of the partners stands for the group's k-th row
    among those that have one.
    """
    alive = allowed.any(2)
    order = np.argsort(~alive, axis=1, kind="stable")  # those without a partner last
    allowed = np.take_along_axis(allowed, order[:, :, None], 1)
    allowed = np.take_along_axis(allowed, order[:, None, :], 2)
    bits = (allowed * POWERS[: allowed.shape[2]]).sum(2, dtype=np.uint64)
    kept = np.take_along_axis(alive, order, 1)
    number = np.take_along_axis(rows, order, 1)
    place = np.broadcast_to(np.arange(rows.shape[1], dtype=np.uint8), rows.shape)
    page = np.broadcast_to(pages[:, None], rows.shape)
    return page[kept], number[kept], bits[kept], place[kept]


def _summed(work: Path, name: str, own: np.ndarray, ranks: Ranks) -> np.ndarray:
    """The sum of what all processes found, handed over by files."""
    part = work / f"{name}.{ranks.process}.json.part"
    part.write_text(json.dumps(own.tolist()))
    os.replace(part, work / f"{name}.{ranks.process}.json")
    ranks.wait()
    paths = [work / f"{name}.{i}.json" for i in range(ranks.processes)]
    total = np.sum([json.loads(p.read_text()) for p in paths], axis=0).astype(np.int64)
    ranks.wait()  # all have read before the first one tidies up
    return total
