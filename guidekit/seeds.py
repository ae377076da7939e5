"""Seeds: as people write them, and derived from a seed and a name."""

import hashlib
import operator
import re
import typing

from guidekit.errors import GuidekitError

MAX_SEEDS = 100_000


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-7`, `0,3,9` or a mix of both as numbers."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or len(seeds) + last - first >= MAX_SEEDS:
            raise GuidekitError(
                f"seeds {text!r}: write a range such as 0-7 or a list such as 0,3,9"
            )
        seeds += range(first, last + 1)
    return check_seeds(seeds)


def as_seeds(given: object) -> tuple[int, ...]:
    """Seeds of a number, a text such as 0-7, or several numbers.

    Raises GuidekitError for none, for one that occurs twice and for what is no seed.
    """
    if isinstance(given, str):
        return parse_seeds(given)
    numbers = (given,) if isinstance(given, int) else given
    try:
        return check_seeds([operator.index(seed) for seed in numbers])
    except TypeError:
        raise GuidekitError(
            f"seeds are whole numbers, or a text such as 0-7, not {given!r}"
        ) from None


def check_seeds(seeds: typing.Sequence[int]) -> tuple[int, ...]:
    """The seeds, which must be different and fit torch's generator."""
    if not seeds:
        raise GuidekitError("there are no seeds; give a range such as 0-7 or a list such as 0,3,9")
    if len(set(seeds)) < len(seeds):
        raise GuidekitError("a seed occurs twice; every picture needs its own")
    if min(seeds) < 0 or max(seeds) >= 2**63:
        raise GuidekitError("seeds lie from 0 to 2^63 - 1")
    return tuple(seeds)


def derived_seed(*parts: int | str) -> int:
    """A seed from numbers and names, the same in every process."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")
