"""From phrases to key columns: which tokens of the encoded prompt belong to which words."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from guidekit.backbones.phrases import key, occurrences, places
from guidekit.backbones.tokenizing import tokenized
from guidekit.conditions import Condition, Segment
from guidekit.errors import GuidekitError


def token_columns(tokenizer, prompt: str, phrase: str, occurrence: int | None = None) -> list[int]:
    """Columns of the padded token sequence that overlap the phrase.

    occurrence: which one in the prompt, from 1; default every one. Raises GuidekitError that shows
    the tokenisation if the phrase does not occur, is cut off, or is unknown to the tokenizer.
    """
    spans = _chosen(places(prompt, phrase), phrase, occurrence)
    encoded = tokenized(tokenizer, prompt, return_offsets_mapping=True)
    length = tokenizer.model_max_length
    columns = [
        i
        for i, (start, end) in enumerate(encoded["offset_mapping"])
        if any(start < last and first < end for first, last in spans)
    ]
    if not columns:
        raise GuidekitError(
            f"phrase {phrase!r} does not occur in the prompt; {show_tokens(tokenizer, prompt)}. "
            "Use words of the prompt, or append the phrase to it (--append-phrases does)"
        )
    if columns[-1] >= length - 1:  # the last column holds the end token
        raise GuidekitError(
            f"phrase {phrase!r} lies beyond the {length} tokens that the text encoder reads; "
            f"shorten the prompt ({show_tokens(tokenizer, prompt)})"
        )
    _check_known(tokenizer, [encoded["input_ids"][i] for i in columns], phrase)
    return columns


def _chosen(spans: list[tuple[int, int]], phrase: str, occurrence: int | None) -> list:
    """All places of the phrase, or one of them."""
    if occurrence is None or not spans:
        return spans
    if occurrence > len(spans):
        raise GuidekitError(
            f"occurrence {occurrence} of {phrase!r}: it occurs {len(spans)} times in the prompt"
        )
    return [spans[occurrence - 1]]


def _check_known(tokenizer, ids: list[int], phrase: str) -> None:
    """Raises GuidekitError if the tokenizer has no token of its own for the phrase."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if all(token in UNKNOWN for token in tokens):
        raise GuidekitError(
            f"the tokenizer does not know {phrase!r}, so the text encoder cannot tell it from "
            "other words; write it in a language that the model reads"
        )


UNKNOWN = ("<unk>", "[UNK]", "\u2581")  # with the mark of a word's begin, which T5 splits off


def show_tokens(tokenizer, prompt: str) -> str:
    """The prompt's tokens with their columns, for error messages."""
    encoded = tokenized(tokenizer, prompt, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    shown = []
    for i, (token, (start, end)) in enumerate(zip(tokens, encoded["offset_mapping"], strict=True)):
        # Tokens of bytes are shown as the letters that they stand for.
        own = token if token is None or token.isascii() else prompt[max(start, 0) : max(end, 0)]
        if token:
            shown.append(f"{i}:{own or token}")
    return "its tokens are " + " ".join(shown)


def append_phrases(condition: Condition, tokenizer) -> Condition:
    """The condition with the phrases that its prompt lacks added at the end of the prompt.

    A phrase of several segments is added until it occurs once for each of them.
    """
    prompt = condition.prompt
    wanted: dict[str, list[Segment]] = {}
    for segment in condition.segments:
        if segment.tokens is None:
            wanted.setdefault(key(segment.phrase), []).append(segment)
    for segments in wanted.values():
        phrase = segments[0].phrase
        least = max([len(segments), *(s.occurrence or 0 for s in segments)])
        for _ in range(least - len(places(prompt, phrase))):
            prompt = f"{prompt} {phrase}".strip()
    return replace(condition, prompt=prompt)


def segment_columns(tokenizers: list, condition: Condition) -> list[list[int]]:
    """Columns of each segment of one image; all tokenizers must agree, as SDXL's two do.

    Columns given by hand (`Segment.tokens`) are taken as they are. Several segments with one
    phrase have one occurrence each (`backbones.phrases.occurrences`).
    """
    columns = []
    for segment, nth in zip(condition.segments, occurrences(condition), strict=True):
        if segment.tokens is not None:
            columns.append(_by_hand(tokenizers, segment))
            continue
        found = [token_columns(t, condition.prompt, segment.phrase, nth) for t in tokenizers]
        if any(other != found[0] for other in found[1:]):
            raise GuidekitError(
                f"the text encoders cut {segment.phrase!r} into different tokens: "
                + "; ".join(show_tokens(t, condition.prompt) for t in tokenizers)
            )
        columns.append(found[0])
    return columns


def _by_hand(tokenizers: list, segment: Segment) -> list[int]:
    """The columns that the user gave; raises GuidekitError for one that there is not."""
    length = min(tokenizer.model_max_length for tokenizer in tokenizers)
    if max(segment.tokens) >= length:
        raise GuidekitError(
            f"segment {segment.phrase!r}: token {max(segment.tokens)}, and the text has columns 0 "
            f"to {length - 1}"
        )
    return sorted(segment.tokens)


def looked_up(conditions: Iterable[Condition]) -> list[str]:
    """The prompts in which some segment's tokens are looked up, not given by hand."""
    return [c.prompt for c in conditions if any(s.tokens is None for s in c.segments)]


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
