"""Encoded pages on disk: images, global features, texts and, if asked for, tokens, in chunks.

A source is cut into parts, of which every process encodes its own: decoding by threads, encoding on
its device. A part's chunks are written one after another; each says at which place of the part the
next one begins, so that a run that is killed goes on there and reads nothing twice. One chunk is
all that is ever in memory.
"""

import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.images import IMAGE_ERRORS
from guidekit.references import square, to_pixels
from guidekit.semantica.columns import Columns, packed, write_columns
from guidekit.semantica.encode import ImageEncoder
from guidekit.semantica.sources import Item, Part
from guidekit.system.progress import Progress
from guidekit.system.untrusted import read_object
from guidekit.train.durable import put_text

OPEN_CHUNKS = 256  # files at a time
LONGEST = 2000  # characters of a text
ROW_BITS, CHUNK_BITS = 20, 16  # of a row's number; the rest is the part's


def _decode(item: Item | None, sizes: tuple[int, int]) -> list[Tensor] | None:
    """The item's image as uint8 (3, s, s) for both sizes; None if it cannot be read."""
    if item is None:
        return None
    try:
        with item.open() as image:
            picture = square(image, sizes[0])
            return [picture, picture if sizes[1] == sizes[0] else square(image, sizes[1])]
    except IMAGE_ERRORS:
        return None


@dataclass(frozen=True)
class Encoding:
    """How pages are encoded and kept.

    size: side of the kept images; the encoder sees them at its own. chunk: rows of a file. batch:
    images of a call of the encoder. tokens: whether they are kept. threads: that decode. process,
    processes: whose parts are encoded here.
    """

    encoder: ImageEncoder
    size: int
    chunk: int = 1024
    batch: int = 64
    tokens: bool = True
    threads: int = 0
    process: int = 0
    processes: int = 1

    @property
    def sizes(self) -> tuple[int, int]:
        """Sides of the kept image and of what the encoder sees."""
        return self.size, self.encoder.config.image_size

    @property
    def keeps_seen(self) -> bool:
        """Whether what the encoder sees is kept beside the image."""
        return not self.tokens and self.sizes[0] != self.sizes[1]

    def facts(self) -> dict:
        """What tells what it writes from others."""
        encoder = self.encoder
        found = {"encoder": encoder.source, "weights": encoder.fingerprint(), "size": self.size}
        return found | {"tokens": self.tokens, "seen": self.keeps_seen}

    def row_bytes(self) -> dict[str, int]:
        """Bytes of a row by column."""
        tokens, channels, pooled = self.encoder.shapes()
        found = {"pictures": 3 * self.size**2, "pooled": 2 * pooled, "page": 8}
        if self.keeps_seen:
            found["seen"] = 3 * self.sizes[1] ** 2
        return found | ({"tokens": 2 * tokens * channels} if self.tokens else {})


def write_pages(
    parts: Sequence[Part],
    how: Encoding,
    folder: Path,
    facts: dict | None = None,
    quiet: bool = True,
    first: bool = True,
) -> "Store":
    """Encodes this process's share of the parts into `folder`, or what is left of it.

    What cannot be read is skipped and counted. facts: what else tells these parts from others.
    first: whether this process may begin the folder. Raises GuidekitError for a folder that was
    begun with an encoder of other weights, another size or other facts.
    """
    folder = Path(folder)
    if first:
        begin(folder, how.facts() | (facts or {}))
    store = Store(folder)
    own = range(how.process, len(parts), how.processes)
    with Progress("encoding", "image", silent=quiet) as progress:
        for number in own:
            _encode_part(parts[number], number, how, store, progress)
    return Store(folder)


def begin(folder: Path, facts: dict) -> None:
    """Makes the folder, or checks that it was begun with the same facts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pages.json"
    before = facts
    if path.exists() and Store(folder).chunks:
        before = read_object(path)
    if other := sorted(k for k in before.keys() | facts.keys() if before.get(k) != facts.get(k)):
        raise GuidekitError(
            f"{folder} was begun with "
            + ", ".join(f"{k} {before.get(k)!r}, not {facts.get(k)!r}" for k in other)
            + "; give another folder or remove it"
        )
    put_text(path, json.dumps(facts))


def _encode_part(
    part: Part, number: int, how: Encoding, store: "Store", progress: Progress
) -> None:
    """Writes the chunks that the part lacks."""
    state = store.state(number)
    if state["last"]:
        return
    writer = _Writer(how, store.folder, number, state)
    for decoded, item, place in _decoded(part.items(state["next"]), how):
        writer.add(decoded, item, place)
        progress.add()
        if writer.count == how.chunk:
            writer.flush(last=False)
    writer.flush(last=True)


def _decoded(
    items: Iterator[tuple[Item | None, int]], how: Encoding
) -> Iterator[tuple[list[Tensor] | None, Item | None, int]]:
    """Decoded images with their items and the places after them, in order."""
    if not how.threads:
        for item, place in items:
            yield _decode(item, how.sizes), item, place
        return
    with ThreadPoolExecutor(how.threads) as pool:
        waiting: deque = deque()
        for item, place in items:
            waiting.append((pool.submit(_decode, item, how.sizes), item, place))
            if len(waiting) > 2 * how.threads:
                future, *rest = waiting.popleft()
                yield future.result(), *rest
        for future, *rest in waiting:
            yield future.result(), *rest


class _Writer:
    """Collects the rows of one chunk, encodes them in batches and writes it whole."""

    def __init__(self, how: Encoding, folder: Path, part: int, state: dict):
        self.how, self.folder, self.part, self.state = how, folder, part, dict(state)
        self._clear()

    def _clear(self) -> None:
        self.pictures: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.waiting: list[Tensor] = []  # for the encoder
        self.encoded: list[list[np.ndarray]] = []
        # Not the items themselves, which hold the files that they were decoded from.
        self.lists: dict[str, list[str]] = {"page": [], "key": [], "caption": []}

    @property
    def count(self) -> int:
        """Number of rows of the chunk so far."""
        return len(self.pictures)

    def add(self, decoded: list[Tensor] | None, item: Item | None, place: int) -> None:
        """Takes one item of the source, readable or not."""
        self.state["seen"] += 1
        self.state["next"] = place
        if decoded is None or item is None:
            self.state["unreadable"] += 1
            return
        self.lists["page"].append(item.page)
        self.lists["key"].append(_bounded(item.key))
        self.lists["caption"].append(item.caption[:LONGEST])
        self.pictures.append(decoded[0])
        if self.how.keeps_seen:
            self.seen.append(decoded[1])
        self.waiting.append(decoded[1])
        if len(self.waiting) == self.how.batch:
            self._encode()

    def _encode(self) -> None:
        with torch.no_grad():
            tokens, pooled = self.how.encoder(to_pixels(torch.stack(self.waiting)))
        kept = [tokens, pooled] if self.how.tokens else [pooled]
        self.encoded.append([x.half().cpu().numpy() for x in kept])
        self.waiting = []

    def flush(self, last: bool) -> None:
        """Writes what was collected; the file appears only when it is complete."""
        state = self.state
        state["rows"] += self.count
        state["last"] = last
        path = self.folder / chunk_name(self.part, state["chunks"])
        facts = {k: state[k] for k in ("rows", "seen", "unreadable", "next", "last")}
        write_columns(path, self._columns(), facts)
        state["chunks"] += 1
        self._clear()

    def _columns(self) -> dict[str, np.ndarray]:
        pages = np.array([page_number(name) for name in self.lists["page"]], np.int64)
        columns = {"page": pages}
        for name in ("key", "caption"):
            columns |= packed(name, self.lists[name])
        if not self.pictures:
            return columns
        if self.waiting:
            self._encode()
        names = ("tokens", "pooled") if self.how.tokens else ("pooled",)
        for name, arrays in zip(names, zip(*self.encoded, strict=True), strict=True):
            columns[name] = np.concatenate(arrays)
        columns["pictures"] = torch.stack(self.pictures).numpy()
        if self.seen:
            columns["seen"] = torch.stack(self.seen).numpy()
        return columns


def page_number(name: str) -> int:
    """64 bits of a page's name: of 10^8 pages two agree with a chance of 3 in 10^4."""
    return int.from_bytes(
        hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(),
        "big",
        signed=True,
    )


def _bounded(name: str) -> str:
    """A name; of a long one, such as a URL that holds data, its beginning and its number."""
    return name if len(name) <= LONGEST else f"{name[:LONGEST]} {page_number(name)}"


def chunk_name(part: int, chunk: int) -> str:
    """The file of a chunk."""
    return f"{part:06d}-{chunk:05d}.safetensors"


def row_numbers(part: int, chunk: int, count: int) -> np.ndarray:
    """Numbers of a chunk's rows (count,): part, chunk and place in one."""
    first = (part << (ROW_BITS + CHUNK_BITS)) | (chunk << ROW_BITS)
    return first + np.arange(count, dtype=np.int64)


def _place(row: int) -> tuple[int, int, int]:
    """Part, chunk and place of a row."""
    chunk = (row >> ROW_BITS) & (2**CHUNK_BITS - 1)
    return row >> (ROW_BITS + CHUNK_BITS), chunk, row & (2**ROW_BITS - 1)


class Store:
    """An encoded folder, read on demand: rows by their numbers. What it holds is kept nowhere.

    chunks: how many chunks each part has, up to the first that is missing, from which on they are
    made anew. facts: what the folder was made of. Raises GuidekitError for a folder that is none.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not (self.folder / "pages.json").exists():
            raise GuidekitError(f"{folder} holds no encoded pages; write_pages makes them")
        self.chunks = self._found()
        self._open = functools.lru_cache(OPEN_CHUNKS)(
            lambda part, chunk: Columns(self.folder / chunk_name(part, chunk))
        )

    def _found(self) -> dict[int, int]:
        """Number of chunks by part: of one name, files without a gap."""
        found: dict[int, int] = {}
        with os.scandir(self.folder) as entries:
            names = sorted(e.name for e in entries if e.name.endswith(".safetensors"))
        for name in names:
            part, _, rest = name.partition("-")
            number, chunk = int(part), int(rest.partition(".")[0])
            if chunk == found.get(number, 0):
                found[number] = chunk + 1
        return found

    @property
    def facts(self) -> dict:
        """What the folder was made of."""
        return read_object(self.folder / "pages.json")

    def state(self, part: int) -> dict:
        """Where the encoding of a part stands, by its last chunk."""
        chunks = self.chunks.get(part, 0)
        if not chunks:
            return {"chunks": 0, "rows": 0, "seen": 0, "unreadable": 0, "next": 0, "last": False}
        file = Columns(self.folder / chunk_name(part, chunks - 1))
        try:
            return file.facts | {"chunks": chunks}
        finally:
            file.close()

    def totals(self, parts: int | None = None) -> dict[str, int]:
        """Rows, items seen and unreadable ones of the first `parts` parts, all by default."""
        states = [self.state(p) for p in self.chunks if parts is None or p < parts]
        return {k: sum(s[k] for s in states) for k in ("rows", "seen", "unreadable")}

    def __len__(self) -> int:
        return self.totals()["rows"]

    def files(self, part: int) -> Iterator[tuple[np.ndarray, Columns]]:
        """A part's chunks, one after another: the numbers of their rows, and the open file."""
        for chunk in range(self.chunks.get(part, 0)):
            file = Columns(self.folder / chunk_name(part, chunk))
            try:
                yield row_numbers(part, chunk, file.length("page")), file
            finally:
                file.close()

    def rows(self, numbers: Sequence[int], *names: str) -> list[Tensor]:
        """The named columns of the rows, in the order of `numbers`."""
        found: dict[int, list[np.ndarray]] = {}
        for number in sorted(set(map(int, numbers))):  # rows of a chunk together: opened once
            part, chunk, place = _place(number)
            file = self._open(part, chunk)
            found[number] = [file.read(name, place, place + 1) for name in names]
        columns = zip(*(found[int(n)] for n in numbers), strict=True)
        return [torch.from_numpy(np.concatenate(rows)) for rows in columns]

    def captions(self, numbers: Sequence[int]) -> list[str]:
        """The texts beside the rows' images, empty where there was none."""
        found = []
        for number in numbers:
            part, chunk, place = _place(int(number))
            found += self._open(part, chunk).texts("caption", place, place + 1)
        return found
