"""Encoded pages on disk: pictures, tokens and global features in sharded safetensors.

Every picture is decoded and encoded once. A run that is killed goes on after the last whole shard.
One shard of pictures is all that is ever in memory; of the others a page's number is kept, 8 bytes.
"""

import functools
import hashlib
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from guidekit.errors import GuidekitError
from guidekit.images import IMAGE_ERRORS
from guidekit.references import square, to_pixels
from guidekit.semantica.encode import ImageEncoder
from guidekit.semantica.sources import Item
from guidekit.untrusted import check_weights, parse_json, read_object

OPEN_SHARDS = 256  # memory-mapped at a time
LONGEST = 2000  # characters of a text of a shard, whose header safetensors reads up to 100 MB


def _decode(item: Item | None, sizes: tuple[int, int]) -> list[Tensor] | None:
    """The item's picture as uint8 (3, s, s) for both sizes; None if it cannot be read."""
    if item is None:
        return None
    try:
        with item.open() as image:
            picture = square(image, sizes[0])
            return [picture, picture if sizes[1] == sizes[0] else square(image, sizes[1])]
    except IMAGE_ERRORS:
        return None


def write_pages(
    items: Iterator[Item | None],
    encoder: ImageEncoder,
    folder: Path,
    size: int,
    shard: int = 1024,
    batch: int = 64,
    quiet: bool = True,
    facts: dict | None = None,
) -> "Pages":
    """Decodes and encodes all items into `folder`, or what is left of them, and opens it.

    Pictures are kept at `size`; the encoder sees them at its own, as it sees a reference later.
    What cannot be read is skipped and counted (`Pages.unreadable`). facts: what else tells these
    items from others. Raises GuidekitError for a folder that was begun with an encoder of other
    weights, another size or other facts, and when no picture can be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"encoder": encoder.source, "weights": encoder.fingerprint(), "size": size} | (
        facts or {}
    )
    _check_same(folder / "pages.json", facts)
    done = [_meta(path) for path in _shards(folder)]
    if not (done and done[-1]["last"]):
        writer = _Writer(encoder, folder, len(done), size, batch, facts)
        seen = sum(meta["seen"] for meta in done)
        bar = tqdm(initial=seen, desc="encoding", disable=quiet, unit=" pictures")
        for item in itertools.islice(items, seen, None):
            writer.add(item)
            bar.update()
            if writer.rows == shard:
                writer.flush(last=False)
        bar.close()
        writer.flush(last=True)
    pages = Pages(folder)
    if not len(pages):
        raise GuidekitError(f"none of {pages.unreadable} pictures could be read")
    return pages


def _check_same(path: Path, facts: dict) -> None:
    """Compares the facts with those that the first shard was written under, if there is one."""
    before = read_object(path) if _shards(path.parent) else facts
    if other := sorted(k for k in before.keys() | facts.keys() if before.get(k) != facts.get(k)):
        raise GuidekitError(
            f"{path.parent} was begun with "
            + ", ".join(f"{k} {before.get(k)!r}, not {facts.get(k)!r}" for k in other)
            + "; give another folder or remove it"
        )


def _shards(folder: Path) -> list[Path]:
    """The shards up to the first that is missing, from which on they are made anew."""
    paths = (folder / f"{number:05d}.safetensors" for number in itertools.count())
    return list(itertools.takewhile(Path.exists, paths))


def _meta(path: Path) -> dict:
    """What a shard says of itself: lists `page`, `key`, `caption`; `seen`, `unreadable`, `last`."""
    try:
        meta = {k: parse_json(v) for k, v in check_weights(path).items()}
    except ValueError as error:
        raise GuidekitError(
            f"{path} is damaged ({error}); remove it, and it is encoded anew"
        ) from None
    if lost := {"page", "key", "caption", "seen", "unreadable", "last"} - meta.keys():
        raise ValueError(f"{path} lacks {min(lost)!r}; remove it, and it is encoded anew")
    return meta


class _Writer:
    """Collects the pictures of one shard, encodes them in batches and writes it whole."""

    def __init__(
        self, encoder: ImageEncoder, folder: Path, number: int, size: int, batch: int, facts: dict
    ):
        self.encoder, self.folder, self.number, self.batch = encoder, folder, number, batch
        self.sizes, self.facts = (size, encoder.config.image_size), facts
        self._clear()

    def _clear(self) -> None:
        self.pictures: list[Tensor] = []
        self.waiting: list[Tensor] = []  # for the encoder
        self.encoded: list[list[Tensor]] = []
        # Not the items themselves, which hold the files that they were decoded from.
        self.lists: dict[str, list[str]] = {"page": [], "key": [], "caption": []}
        self.seen = self.unreadable = 0

    @property
    def rows(self) -> int:
        """Number of pictures of the shard so far."""
        return len(self.pictures)

    def add(self, item: Item | None) -> None:
        """Takes one item of the source, readable or not."""
        self.seen += 1
        decoded = _decode(item, self.sizes)
        if decoded is None:
            self.unreadable += 1
            return
        self.lists["page"].append(_bounded(item.page))
        self.lists["key"].append(_bounded(item.key))
        self.lists["caption"].append(item.caption[:LONGEST])
        self.pictures.append(decoded[0])
        self.waiting.append(decoded[1])
        if len(self.waiting) == self.batch:
            self._encode()

    def _encode(self) -> None:
        with torch.no_grad():
            encoded = self.encoder(to_pixels(torch.stack(self.waiting)))
        self.encoded.append([x.half().cpu() for x in encoded])
        self.waiting = []

    def flush(self, last: bool) -> None:
        """Writes what was collected; the file appears only when it is complete."""
        tensors = self._tensors() if self.pictures else {}
        counts = {"seen": self.seen, "unreadable": self.unreadable, "last": last}
        metadata = {k: json.dumps(v) for k, v in (self.lists | counts).items()}
        if not self.number:
            save_text(self.folder / "pages.json", json.dumps(self.facts))
        path = self.folder / f"{self.number:05d}.safetensors"
        save_file(tensors, f"{path}.part", metadata=metadata)
        os.replace(f"{path}.part", path)
        self.number += 1
        self._clear()

    def _tensors(self) -> dict[str, Tensor]:
        if self.waiting:
            self._encode()
        tokens, pooled = (torch.cat(x).contiguous() for x in zip(*self.encoded, strict=True))
        return {"pictures": torch.stack(self.pictures), "tokens": tokens, "pooled": pooled}


def save_text(path: Path, text: str) -> None:
    """Writes a file that appears only when it is complete."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def _number(name: str) -> int:
    """64 bits of a page's name: of 10^8 pages two agree with a chance of 3 in 10^4."""
    return int.from_bytes(
        hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(),
        "big",
        signed=True,
    )


def _bounded(name: str) -> str:
    """A name; of a long one, such as a URL that holds data, its beginning and its number."""
    return name if len(name) <= LONGEST else f"{name[:LONGEST]} {_number(name)}"


class Pages:
    """An encoded folder: rows of pictures (uint8), tokens and pooled (float16), read on demand.

    page: number of every row's page, (n,) int64, the same for pages of the same name. facts: what
    the folder was made of. Raises GuidekitError for a folder without shards.
    """

    def __init__(self, folder: Path):
        self.folder, self.shards = Path(folder), _shards(Path(folder))
        if not self.shards:
            raise GuidekitError(f"{folder} holds no encoded pages; write_pages makes them")
        page: list[np.ndarray] = []
        self.starts, self.unreadable, rows = [], 0, 0
        for path in self.shards:
            meta = _meta(path)
            self.starts.append(rows)
            self.unreadable += meta["unreadable"]
            page.append(np.array([_number(name) for name in meta["page"]], np.int64))
            rows += len(meta["page"])
        self.page = np.concatenate(page)
        self.facts = read_object(self.folder / "pages.json")
        self._open = functools.lru_cache(OPEN_SHARDS)(lambda i: safe_open(self.shards[i], "pt"))

    def __len__(self) -> int:
        return len(self.page)

    def rows(self, indices: list[int], *names: str) -> list[Tensor]:
        """The named tensors of the rows, in the order of `indices`."""
        found: dict[int, list[Tensor]] = {}
        for index in sorted(indices):  # rows of a shard together: it is opened once
            place = bisect_right(self.starts, index) - 1
            row, file = index - self.starts[place], self._open(place)
            found[index] = [file.get_slice(name)[row : row + 1] for name in names]
        return [torch.cat(rows) for rows in zip(*(found[i] for i in indices), strict=True)]

    def captions(self, indices: list[int]) -> list[str]:
        """The texts beside the rows' pictures, empty where there was none."""
        found = []
        for index in indices:
            place = bisect_right(self.starts, index) - 1
            found.append(self._captions(place)[index - self.starts[place]])
        return found

    @functools.lru_cache(OPEN_SHARDS)  # noqa: B019  (lives as long as the process)
    def _captions(self, place: int) -> list[str]:
        return _meta(self.shards[place])["caption"]

    def members(self) -> Iterator[np.ndarray]:
        """The rows of every page with at least two pictures, page after page."""
        order = np.argsort(self.page, kind="stable")
        cuts = np.flatnonzero(np.diff(self.page[order])) + 1
        for rows in np.split(order, cuts):
            if len(rows) > 1:
                yield rows
