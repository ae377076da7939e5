"""Encoded pages on disk: pictures, tokens and global features in sharded safetensors.

Every picture is decoded and encoded once. A run that is killed goes on after the last whole shard;
one shard of pictures is all that is ever in memory.
"""

import functools
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

from guidekit.pictures import PICTURE_ERRORS
from guidekit.references import square, to_pixels
from guidekit.semantica.encode import ImageEncoder
from guidekit.semantica.sources import Item

OPEN_SHARDS = 16  # memory-mapped at a time


def _decode(item: Item | None, size: int) -> Tensor | None:
    """The item's picture (3, size, size) uint8; None if it cannot be read."""
    if item is None:
        return None
    try:
        with item.open() as image:
            return square(image, size)
    except PICTURE_ERRORS:
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

    What cannot be read is skipped and counted (`Pages.unreadable`). facts: what else tells these
    items from others. Raises ValueError for a folder that was begun with another encoder or size,
    or other facts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder / "pages.json", {"encoder": encoder.source, "size": size} | (facts or {}))
    done = [_meta(path) for path in _shards(folder)]
    if done and done[-1]["last"]:
        return Pages(folder)
    seen = sum(meta["seen"] for meta in done)
    writer = _Writer(encoder, folder, len(done), batch)
    bar = tqdm(initial=seen, desc="encoding", disable=quiet, unit=" pictures")
    for item in itertools.islice(items, seen, None):
        writer.add(item, _decode(item, size))
        bar.update()
        if len(writer.pictures) == shard:
            writer.flush(last=False)
    bar.close()
    writer.flush(last=True)
    pages = Pages(folder)
    if not len(pages):
        raise ValueError(f"none of {pages.unreadable} pictures could be read")
    return pages


def _check_same(path: Path, facts: dict) -> None:
    """Writes the facts, or compares them with those that were written before."""
    if not path.exists():
        path.write_text(json.dumps(facts))
    elif (before := json.loads(path.read_text())) != facts:
        raise ValueError(
            f"{path.parent} was begun with {before}, not {facts}; give another folder or remove it"
        )


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _meta(path: Path) -> dict:
    """What a shard says of itself: lists `page`, `key`, `caption`; `seen`, `unreadable`, `last`."""
    with safe_open(path, "pt") as file:
        return {k: json.loads(v) for k, v in file.metadata().items()}


class _Writer:
    """Collects the pictures of one shard and writes it whole."""

    def __init__(self, encoder: ImageEncoder, folder: Path, number: int, batch: int):
        self.encoder, self.folder, self.number, self.batch = encoder, folder, number, batch
        self._clear()

    def _clear(self) -> None:
        self.pictures: list[Tensor] = []
        # Not the items themselves, which hold the files that they were decoded from.
        self.lists: dict[str, list[str]] = {"page": [], "key": [], "caption": []}
        self.seen = self.unreadable = 0

    def add(self, item: Item | None, picture: Tensor | None) -> None:
        """Takes one item of the source, read or not."""
        self.seen += 1
        if picture is None:
            self.unreadable += 1
        else:
            for name, values in self.lists.items():
                values.append(getattr(item, name))
            self.pictures.append(picture)

    def flush(self, last: bool) -> None:
        """Encodes and writes what was collected; the file appears only when it is complete."""
        tensors = self._tensors() if self.pictures else {}
        counts = {"seen": self.seen, "unreadable": self.unreadable, "last": last}
        metadata = {k: json.dumps(v) for k, v in (self.lists | counts).items()}
        path = self.folder / f"{self.number:05d}.safetensors"
        save_file(tensors, f"{path}.part", metadata=metadata)
        os.replace(f"{path}.part", path)
        self.number += 1
        self._clear()

    def _tensors(self) -> dict[str, Tensor]:
        pictures, parts = torch.stack(self.pictures), []
        with torch.no_grad():
            for part in pictures.split(self.batch):
                parts.append([x.half().cpu() for x in self.encoder(to_pixels(part))])
        tokens, pooled = (torch.cat(x).contiguous() for x in zip(*parts, strict=True))
        return {"pictures": pictures, "tokens": tokens, "pooled": pooled}


class Pages:
    """An encoded folder: rows of pictures (uint8), tokens and pooled (float16), read on demand.

    page: number of every row's page, (n,) int64. names: the pages' names. Raises ValueError for a
    folder without shards.
    """

    def __init__(self, folder: Path):
        self.folder, self.shards = Path(folder), _shards(Path(folder))
        if not self.shards:
            raise ValueError(f"{folder} holds no encoded pages; write_pages makes them")
        numbers: dict[str, int] = {}
        page: list[int] = []
        self.starts, self.unreadable = [], 0
        for path in self.shards:
            meta = _meta(path)
            self.starts.append(len(page))
            self.unreadable += meta["unreadable"]
            page += [numbers.setdefault(name, len(numbers)) for name in meta["page"]]
        self.page, self.names = np.array(page, np.int64), list(numbers)
        self._open = functools.lru_cache(OPEN_SHARDS)(lambda i: safe_open(self.shards[i], "pt"))

    def __len__(self) -> int:
        return len(self.page)

    def rows(self, indices: list[int], *names: str) -> list[Tensor]:
        """The named tensors of the rows, in the order of `indices`."""
        found: list[list[Tensor]] = [[] for _ in names]
        for index in indices:
            place = bisect_right(self.starts, index) - 1
            row = index - self.starts[place]
            for out, name in zip(found, names, strict=True):
                out.append(self._open(place).get_slice(name)[row : row + 1])
        return [torch.cat(out) for out in found]

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
