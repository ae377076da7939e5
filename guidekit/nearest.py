"""The nearest of the names that exist, for messages about one that does not."""

import difflib
from collections.abc import Iterable


def nearest(word: str, names: Iterable[str]) -> str:
    """` (the nearest is NAME)`, or nothing where no name is near."""
    found = difflib.get_close_matches(word, list(names), 1)
    return f" (the nearest is {found[0]})" if found else ""
