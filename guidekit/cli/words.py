"""Words of a prompt that a small tokenizer does not have."""

import re


def unknown_words(tokenizer, prompt: str) -> list[str]:
    """Words that a tokenizer made for one world spells in pieces; each once, as written.

    A byte-level vocabulary has no unknown token: a word that it lacks becomes letters. Of a large
    one pieces say nothing, so this is for the built-in models alone.
    """
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    found = {}
    for match in re.finditer(r"[^\W\d_]+", prompt):
        pieces = [1 for start, end in offsets if start < match.end() and match.start() < end]
        if len(pieces) > 1:
            found[match[0].lower()] = match[0]
    return list(found.values())
