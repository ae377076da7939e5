"""Episodes: a page drawn uniformly, an image of it and another one (arXiv:2405.14857, section 4.1).

Which they are is a function of the episode's number alone, and is read from disk when it is asked.
"""

import functools
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.references import to_pixels
from guidekit.seeds import mixed, shuffled
from guidekit.semantica.columns import Columns
from guidekit.semantica.data import Store
from guidekit.system.untrusted import read_object

OPEN_PARTITIONS = 256  # files at a time
PATIENCE, PAUSE = 7 * 86400.0, 0.5  # seconds that a worker waits for pages, and between two looks


class PageIndex:
    """The pages that a filter left, in the partitions of a folder.

    Raises GuidekitError where there are none.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not (self.folder / "filter.json").exists():
            raise GuidekitError(f"{folder} has no pairs; find_pairs makes them")
        table = read_object(self.folder / "filter.json")
        self.ends = np.cumsum(table["pages"])
        self.unfiltered = table["total"]
        self._open = functools.lru_cache(OPEN_PARTITIONS)(
            lambda i: Columns(self.folder / f"{i:06d}.safetensors")
        )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _page(self, number: int) -> tuple[Columns, int, int]:
        """The file of a page, and its first row and the one after its last."""
        partition = bisect_right(self.ends, number)
        own = number - (int(self.ends[partition - 1]) if partition else 0)
        file = self._open(partition)
        first, last = file.read("start", own, own + 2).tolist()
        return file, first, last

    def pairs(self, number: int) -> list[tuple[int, int]]:
        """All pairs that a page may give, by the numbers of their rows."""
        file, first, last = self._page(number)
        rows = file.read("row", first, last).tolist()
        found = []
        for i in range(last - first):
            group, bits = self._partners(file, first + i)
            found += [(rows[i], rows[group - first + bit]) for bit in bits]
        return found

    def draw(self, number: int, key: int) -> tuple[int, int]:
        """An image of a page and one of its partners, both uniformly, by the key."""
        file, first, last = self._page(number)
        one = first + mixed(key, 1) % (last - first)
        group, bits = self._partners(file, one)
        two = group + bits[mixed(key, 2) % len(bits)]
        return int(file.read("row", one, one + 1)[0]), int(file.read("row", two, two + 1)[0])

    def _partners(self, file: Columns, row: int) -> tuple[int, list[int]]:
        """The first row of a row's group, and which of the group are its partners."""
        bits = int(file.read("partners", row, row + 1)[0])
        group = row - int(file.read("place", row, row + 1)[0])
        return group, [bit for bit in range(bits.bit_length()) if bits >> bit & 1]


class Episodes:
    """Pairs of images of one page: every page once an epoch, in an order that is computed.

    folders: of the filters. Where there are several, each is of more of the store than the one
    before, and serves `each` episodes before the next one takes over; a number whose filter is not
    there yet is waited for. Raises GuidekitError if the first is not there.
    """

    def __init__(self, store: Store, folders: list[Path] | Path | None = None, each: int = 0):
        self.store, self.each = store, each
        folders = store.folder / "filter" if folders is None else folders
        self.folders = folders if isinstance(folders, list) else [folders]
        self.ready: Callable[[int], None] = lambda end: None  # see guidekit.semantica.growth
        self._index: Callable[[int], PageIndex] = functools.cache(self._opened)
        self._index(0)

    def _opened(self, number: int) -> PageIndex:
        folder, until = self.folders[number], time.monotonic() + PATIENCE
        while number and not (folder / "filter.json").exists() and time.monotonic() < until:
            time.sleep(PAUSE)
        return PageIndex(folder)

    @property
    def has_tokens(self) -> bool:
        """Whether tokens are kept, or made of what the encoder sees."""
        return bool(self.store.facts["tokens"])

    @functools.cached_property
    def _seen(self) -> str:
        """The column of what the encoder sees."""
        return "seen" if self.store.facts.get("seen") else "pictures"

    def __len__(self) -> int:
        """Pages of the first filter."""
        return len(self._index(0))

    def filter_of(self, number: int) -> int:
        """Which filter an episode is of."""
        last = len(self.folders) - 1
        return min(number // self.each, last) if last else 0

    def pair(self, number: int) -> tuple[int, int]:
        """Rows of the condition and of the image to draw; every epoch has another order."""
        which = self.filter_of(number)
        index = self._index(which)
        epoch, place = divmod(number - which * self.each, len(index))
        page = shuffled(place, len(index), epoch)
        return index.draw(page, number)

    def batch(self, numbers: range, feature: str = "tokens") -> tuple[Tensor, Tensor]:
        """States (B, T, D) of the conditions and pixels (B, 3, H, W) in [-1, 1] to draw.

        feature: "tokens", or "pooled" for the global feature, whose T is 1; "seen" for what the
        encoder is to see instead, pixels (B, 3, s, s) in [-1, 1].
        """
        conditions, targets = zip(*(self.pair(n) for n in numbers), strict=True)
        (pictures,) = self.store.rows(targets, "pictures")
        return self.conditions(conditions, feature), to_pixels(pictures)

    def conditions(self, rows: tuple[int, ...] | list[int], feature: str) -> Tensor:
        """What the model is told of rows: see `batch`."""
        if feature == "seen":
            return to_pixels(self.store.rows(rows, self._seen)[0])
        (states,) = self.store.rows(rows, feature)
        states = states.float()
        return states[:, None] if states.ndim == 2 else states
