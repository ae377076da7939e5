"""Tokenizers as the text encoders see their prompts: expanded, joined, inside a template.

Each is called like a tokenizer with a prompt and answers `input_ids`, `attention_mask` and
`offset_mapping`, column by column; the offsets are places in the prompt as the user wrote it.
"""

import re
from collections.abc import Callable

from guidekit.errors import GuidekitError


class ExpandingTokenizer:
    """A tokenizer before which the pipeline writes out textual inversions of several vectors.

    convert: the pipeline's `maybe_convert_prompt`, by which `<toy>` becomes `<toy> <toy>_1`.
    """

    def __init__(self, tokenizer, convert: Callable):
        self.tokenizer, self.convert = tokenizer, convert
        self.model_max_length = tokenizer.model_max_length

    def __call__(self, text: str, **options) -> dict[str, list]:
        """What the tokenizer says of the text written out, with places in `text`."""
        written, begins, ends = self._written_out(text)
        found = self.tokenizer(written, **options | {"return_offsets_mapping": True})
        places = [
            (begins[first], ends[last - 1]) if last > first else (0, 0)
            for first, last in found["offset_mapping"]
        ]
        names = ("input_ids", "attention_mask")
        return {name: found[name] for name in names} | {"offset_mapping": places}

    def _written_out(self, text: str) -> tuple[str, list[int], list[int]]:
        """The text written out, and where each of its letters begins and ends in `text`.

        Raises GuidekitError where the pipeline writes it otherwise.
        """
        pieces = [(text[i], i, i + 1) for i in range(len(text))]
        if several := self._several():
            pattern = "|".join(map(re.escape, sorted(several, key=len, reverse=True)))
            for match in reversed(list(re.finditer(pattern, text))):
                first, last = match.span()
                pieces[first:last] = [(c, first, last) for c in several[match[0]]]
        written = "".join(letter for letter, _, _ in pieces)
        if written != (own := self.convert(text, self.tokenizer)):
            raise GuidekitError(
                f"the pipeline reads the prompt as {own!r}, where {written!r} was expected; give "
                "the columns of the phrases by hand (Segment(tokens=...))"
            )
        return written, [first for _, first, _ in pieces], [last for _, _, last in pieces]

    def _several(self) -> dict[str, str]:
        """Tokens with several vectors, and what each is written out as."""
        known = self.tokenizer.get_added_vocab()
        found = {}
        for token in known:
            count = 1
            while f"{token}_{count}" in known:
                count += 1
            if count > 1:
                found[token] = " ".join([token, *(f"{token}_{i}" for i in range(1, count))])
        return found

    def convert_ids_to_tokens(self, ids):
        """The tokens of `input_ids`."""
        return self.tokenizer.convert_ids_to_tokens(ids)


def expanding(pipeline, tokenizer):
    """The tokenizer as the pipeline calls it; None and tokenizers without inversions stay."""
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    return tokenizer if None in (tokenizer, convert) else ExpandingTokenizer(tokenizer, convert)


class KeyTokenizer:
    """Tokenizers whose texts stand one after the other among a denoiser's keys.

    parts: (tokenizer, length) in the order of the keys, None where a text encoder is absent. It
    answers like one tokenizer whose parts but the last are padded and cut to their lengths.
    """

    def __init__(self, parts: list[tuple]):
        self.parts = parts
        self.model_max_length = sum(length for _, length in parts)

    def __call__(self, text: str, **_) -> dict[str, list]:
        """`input_ids`, `attention_mask` and `offset_mapping` of a prompt, column by column."""
        found = {"input_ids": [], "attention_mask": [], "offset_mapping": []}
        padding = {"input_ids": None, "attention_mask": 0, "offset_mapping": (0, 0)}
        end = 0
        for i, (tokenizer, length) in enumerate(self.parts):
            end += length
            last = i == len(self.parts) - 1
            cut = {} if last else {"truncation": True, "max_length": length}
            part = tokenizer(text, return_offsets_mapping=True, **cut) if tokenizer else {}
            for name, values in found.items():
                values += part.get(name, [])
                values += [] if last else [padding[name]] * (end - len(values))
        return found

    def convert_ids_to_tokens(self, ids: list[int | None]) -> list[str]:
        """The tokens of `input_ids`; padding is empty."""
        tokens, start = [], 0
        for tokenizer, length in self.parts:
            part, start = ids[start : start + length], start + length
            tokens += ["" if i is None else tokenizer.convert_ids_to_tokens(i) for i in part]
        return tokens


class TemplateTokenizer:
    """The tokenizer of a text encoder that reads each prompt inside a text of the pipeline's own.

    before, after: what stands around the prompt. lead, start: the model sees the first `lead`
    tokens and those from `start` on. length: the most tokens that it sees. It answers for these
    tokens, with places in the prompt alone; those of the text around lie outside of it.
    """

    def __init__(
        self,
        tokenizer,
        length: int,
        before: str = "",
        after: str = "",
        lead: int = 0,
        start: int = 0,
    ):
        self.tokenizer, self.model_max_length = tokenizer, length
        self.before, self.after, self.lead, self.start = before, after, lead, start

    def __call__(self, text: str, **_) -> dict[str, list]:
        """`input_ids`, `attention_mask` and `offset_mapping` of a prompt, column by column."""
        around = f"{self.before}{text}{self.after}"
        found = self.tokenizer(around, return_offsets_mapping=True)
        seen = {name: self._seen(found[name]) for name in ("input_ids", "attention_mask")}
        places = self._seen(found["offset_mapping"])
        own = [(first - len(self.before), last - len(self.before)) for first, last in places]
        return seen | {"offset_mapping": own}

    def _seen(self, values: list) -> list:
        return [*values[: self.lead], *values[self.start :]]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The tokens of `input_ids`."""
        return self.tokenizer.convert_ids_to_tokens(ids)
