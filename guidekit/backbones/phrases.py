"""Where a phrase stands in a prompt: whole words, or any place in scripts without spaces."""

import re

from guidekit.conditions import Condition
from guidekit.errors import GuidekitError

# Thai to Khmer, Japanese kana, Chinese characters: scripts that put no space between words.
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_SPACELESS = re.compile(f"[{SPACELESS}]")


def places(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """First and last place of every occurrence of the phrase, whatever its case.

    Between words any white space; no word is cut, where its script divides words.
    """
    words = phrase.split()
    pattern = r"\s+".join(re.escape(word) for word in words)
    before = "" if _SPACELESS.match(words[0][0]) else rf"(?<![^\W{SPACELESS}])"
    after = "" if _SPACELESS.match(words[-1][-1]) else rf"(?![^\W{SPACELESS}])"
    found = re.finditer(before + pattern + after, prompt, flags=re.IGNORECASE)
    return [match.span() for match in found]


def key(phrase: str) -> str:
    """What two spellings of one phrase have in common."""
    return " ".join(phrase.lower().split())


def occurrences(condition: Condition) -> list[int | None]:
    """The occurrence (from 1) of its phrase that each segment means; None stands for all.

    A segment's own `occurrence` counts. Where several segments have one phrase, the n-th of them
    means the n-th occurrence. Raises GuidekitError where there are not as many occurrences as such
    segments: two masks for the same tokens would pull against each other.
    """
    open_: dict[str, list[int]] = {}
    for index, segment in enumerate(condition.segments):
        if segment.tokens is None and segment.occurrence is None:
            open_.setdefault(key(segment.phrase), []).append(index)
    found = [segment.occurrence for segment in condition.segments]
    for members in open_.values():
        if len(members) == 1:
            continue
        phrase = condition.segments[members[0]].phrase
        count = len(places(condition.prompt, phrase))
        if count != len(members):
            raise GuidekitError(
                f"{len(members)} segments have the phrase {phrase!r}, which occurs {count} times in"
                " the prompt; write it once for each, give each its `occurrence` or `tokens`, or "
                "join their masks"
            )
        for nth, index in enumerate(members, 1):
            found[index] = nth
    return found
