"""Seeds: as people write them, derived from a seed and a name; orders that a number chooses."""

import hashlib
import re
import struct
from collections.abc import Iterable
from typing import Self

from guidekit.errors import GuidekitError

MAX_SEEDS = 100_000
ROUNDS = 4  # of the shuffle


class Seeds(tuple[int, ...]):
    """Different seeds, one an image, as people write them: `0-7`, `0,3,9`, a mix, or numbers.

    Raises GuidekitError for a text of another form, no seed, one that occurs twice, and one that
    torch's generator does not take.
    """

    def __new__(cls, value: str | int | Iterable[int] = ()) -> Self:
        """Reads a text, a number or numbers."""
        seeds = _parsed(value) if isinstance(value, str) else _numbers(value)
        if not seeds:
            raise GuidekitError(
                "there are no seeds; give a range such as 0-7 or a list such as 0,3,9"
            )
        if len(set(seeds)) < len(seeds):
            raise GuidekitError("a seed occurs twice; every image needs its own")
        if min(seeds) < 0 or max(seeds) >= 2**63:
            raise GuidekitError("seeds lie from 0 to 2^63 - 1")
        return super().__new__(cls, seeds)

    def __str__(self) -> str:
        if len(self) > 1 and self == tuple(range(self[0], self[0] + len(self))):
            return f"{self[0]}-{self[-1]}"
        return ",".join(map(str, self))


def _parsed(text: str) -> list[int]:
    """The seeds of a text."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or len(seeds) + last - first >= MAX_SEEDS:
            raise GuidekitError(
                f"seeds {text!r}: write a range such as 0-7 or a list such as 0,3,9"
            )
        seeds += range(first, last + 1)
    return seeds


def _numbers(value: int | Iterable[int]) -> list[int]:
    """The seeds of a number, or of a list of whole numbers."""
    given = list(value) if isinstance(value, Iterable) else [value]
    try:
        whole = all(int(seed) == seed and not isinstance(seed, bool) for seed in given)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise GuidekitError(f"seeds must be whole numbers, such as 0-7 or 0,3,9, not {value!r}")
    return [int(seed) for seed in given]


def derived_seed(*parts: int | str) -> int:
    """A seed from numbers and names, the same in every process."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def shuffled(place: int, count: int, key: int) -> int:
    """Where `place` goes in a permutation of range(count) that `key` chooses, without a table.

    A Feistel network of four rounds permutes the numbers of an even number of bits; those beyond
    count are sent on until they fall below (Black, Rogaway 2002, "Ciphers with arbitrary finite
    domains", cycle walking).
    """
    half = max((count - 1).bit_length() + 1, 2) // 2
    while True:
        left, right = divmod(place, 1 << half)
        for turn in range(ROUNDS):
            left, right = right, left ^ (mixed(key, turn, right) % (1 << half))
        place = (left << half) | right
        if place < count:
            return place


def mixed(*numbers: int) -> int:
    """64 bits that look random, a function of the numbers."""
    packed = struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "big")
