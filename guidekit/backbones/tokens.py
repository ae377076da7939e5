"""From phrases to key columns: which tokens of the encoded prompt belong to which words."""

import re

import torch
from torch import Tensor

from guidekit.conditions import Condition
from guidekit.errors import GuidekitError


def token_columns(tokenizer, prompt: str, phrase: str) -> list[int]:
    """Columns of the padded token sequence that overlap the phrase, at every occurrence.

    Raises GuidekitError that shows the tokenisation if the phrase does not occur or is cut off.
    """
    spans = [m.span() for m in re.finditer(_whole_words(phrase), prompt, flags=re.IGNORECASE)]
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    length = tokenizer.model_max_length
    offsets = encoded["offset_mapping"]
    columns = [
        i
        for i, (start, end) in enumerate(offsets)
        if any(start < last and first < end for first, last in spans)
    ]
    if not columns:
        raise GuidekitError(
            f"phrase {phrase!r} does not occur in the prompt; {show_tokens(tokenizer, prompt)}. "
            "Use words of the prompt, or append missing phrases (--append-phrases)"
        )
    if columns[-1] >= length - 1:  # the last column holds the end token
        raise GuidekitError(
            f"phrase {phrase!r} lies beyond the {length} tokens that the text encoder reads; "
            f"shorten the prompt ({show_tokens(tokenizer, prompt)})"
        )
    return columns


def _whole_words(phrase: str) -> str:
    """Pattern of the phrase with any white space between its words and none of its words cut."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return rf"(?<!\w){words}(?!\w)"


def show_tokens(tokenizer, prompt: str) -> str:
    """The prompt's tokens with their columns, for error messages."""
    ids = tokenizer(prompt)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return "its tokens are " + " ".join(f"{i}:{t}" for i, t in enumerate(tokens) if t)


def append_phrases(condition: Condition, tokenizer) -> Condition:
    """The condition with every phrase that its prompt lacks added at the end of the prompt."""
    from dataclasses import replace

    prompt = condition.prompt
    for segment in condition.segments:
        if not re.search(_whole_words(segment.phrase), prompt, flags=re.IGNORECASE):
            prompt = f"{prompt} {segment.phrase}".strip()
    return replace(condition, prompt=prompt)


def segment_columns(tokenizers: list, condition: Condition) -> list[list[int]]:
    """Columns of each segment of one picture; all tokenizers must agree, as SDXL's two do."""
    columns = []
    for segment in condition.segments:
        found = [token_columns(t, condition.prompt, segment.phrase) for t in tokenizers]
        if any(other != found[0] for other in found[1:]):
            raise GuidekitError(
                f"the text encoders cut {segment.phrase!r} into different tokens: "
                + "; ".join(show_tokens(t, condition.prompt) for t in tokenizers)
            )
        columns.append(found[0])
    return columns


def segment_weights(tokenizers: list, conditions: list[Condition], length: int) -> Tensor:
    """Key weights `(B, T, S)`: 1 where a token belongs to a segment, so maps sum over tokens.

    ZestGuide, Eq. 3 (Couairon et al. 2023, arXiv:2306.13754): the sum over a segment's tokens.
    """
    most = max(len(c.segments) for c in conditions)
    weights = torch.zeros(len(conditions), length, most)
    for b, condition in enumerate(conditions):
        for s, columns in enumerate(segment_columns(tokenizers, condition)):
            weights[b, columns, s] = 1
    return weights


def real_tokens(tokenizers: list, conditions: list[Condition], length: int) -> Tensor:
    """Mask `(B, T)`: True for start, words and end, False for padding."""
    mask = torch.zeros(len(conditions), length, dtype=torch.bool)
    for row, condition in zip(mask, conditions, strict=True):
        own = torch.tensor(tokenizers[0](condition.prompt)["attention_mask"][:length])
        row[: len(own)] = own.bool()
    return mask


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
