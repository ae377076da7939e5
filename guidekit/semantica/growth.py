"""Pages that are encoded while a training already draws from those that are there.

The first share of a source's parts is encoded and filtered before the first step. After every
`each` episodes twice as many parts count, which all processes encode together when it is time; so
what an episode is remains a function of its number, and a resumed training draws the same.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guidekit.semantica.data import Encoding, Store, begin, write_pages
from guidekit.semantica.episodes import Episodes
from guidekit.semantica.groups import Ranks, find_pairs
from guidekit.semantica.pairs import Filtered, answered, request
from guidekit.semantica.sources import Part

Bounds = tuple[float | None, float | None, tuple[float, float] | None]


def shares(parts: int, first: float) -> list[int]:
    """How many parts count, filter by filter: a share at first, twice as many each time."""
    counts = [max(1, min(parts, round(parts * first)))]
    while counts[-1] < parts:
        counts.append(min(parts, 2 * counts[-1]))
    return counts


@dataclass
class Growth:
    """Encodes and filters the parts of a source, a share at a time. Every process has one.

    store, chosen: folders of the encoded pages and of the filters. first: share of the parts that
    is encoded before the first step. each: episodes between two filters. tell: what is done with
    each filter found, by the first process.
    """

    parts: Sequence[Part]
    how: Encoding
    store: Path
    chosen: Path
    bounds: Bounds
    facts: dict
    ranks: Ranks
    first: float = 1.0
    each: int = 0
    quiet: bool = True
    tell: Callable[[Store, Filtered, Path], None] = lambda store, found, folder: None
    reached: int = field(default=0, init=False)  # filters that are there

    def __post_init__(self):
        self.counts = shares(len(self.parts), self.first)
        one = len(self.counts) == 1
        self.folders = [
            self.chosen if one else self.chosen.with_name(f"{self.chosen.name}-{i}")
            for i in range(len(self.counts))
        ]

    def episodes(self) -> Episodes:
        """The episodes of what is there, which grow by `ready`."""
        self.ready(1)
        found = Episodes(Store(self.store), self.folders, self.each)
        found.ready = self.ready
        return found

    def ready(self, end: int) -> None:
        """Makes the filters of the episodes below `end` that are not there; all processes call."""
        last = len(self.counts) - 1
        needed = min((end - 1) // self.each, last) if last else 0
        while self.reached <= needed:
            self._reach(self.reached)
            self.reached += 1

    def _reach(self, number: int) -> None:
        """Encodes the parts of a filter and makes it, unless it is there."""
        count, folder, ranks = self.counts[number], self.folders[number], self.ranks
        if ranks.process == 0:
            names = "\n".join(part.name for part in self.parts).encode(errors="replace")
            parts = f"{len(self.parts)} {hashlib.sha256(names).hexdigest()[:16]}"
            begin(self.store, self.how.facts() | self.facts | {"parts": parts})
        ranks.wait()
        write_pages(self.parts[:count], self.how, self.store, quiet=self.quiet, first=False)
        ranks.wait()
        store = Store(self.store)
        there = answered(folder, request(store, store.totals(count), *self.bounds))
        ranks.wait()
        if there:
            return
        if ranks.process == 0:
            shutil.rmtree(folder, ignore_errors=True)
        found = find_pairs(store, *self.bounds, out=folder, parts=count, ranks=ranks)
        if ranks.process == 0:
            self.tell(store, found, folder)
