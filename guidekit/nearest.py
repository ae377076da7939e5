"""The nearest of the names that exist, for messages about one that does not."""

import difflib
from collections.abc import Iterable, Mapping


def nearest(word: str, names: Iterable[str]) -> str:
    """` (the nearest is NAME)`, or nothing where no name is near.

    names: those that exist, or spellings of them with the name of each.
    """
    found = difflib.get_close_matches(word, list(names), 1)
    called = names if isinstance(names, Mapping) else {}
    return f" (the nearest is {called.get(found[0], found[0])})" if found else ""
