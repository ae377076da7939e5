"""Phrases to key columns: every occurrence, whole words, and errors that show the tokens."""

import pytest

import tiny
from guidekit import Condition, Sampling, Segment, box_mask
from guidekit.backbones.tokens import (
    append_phrases,
    real_tokens,
    segment_columns,
    segment_weights,
    token_columns,
)
from guidekit.errors import GuidekitError
from guidekit.testing import text_encoders

MASK = box_mask((0, 0, 0.5, 1))


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


@pytest.mark.parametrize(
    "prompt, phrase, expected",
    [
        ("a red circle on white", "red circle", [2, 3]),
        ("red and red and RED", "red", [1, 3, 5]),
        ("a  red\tcircle", "red circle", [2, 3]),
        ("a circle, red.", "circle", [2]),
        ("redd red", "red", None),  # checked below: only the whole word
    ],
)
def test_columns_of_every_occurrence(words, prompt, phrase, expected):
    columns = token_columns(words, prompt, phrase)
    tokens = words.convert_ids_to_tokens(words(prompt)["input_ids"])
    if expected is None:
        expected = [len(tokens) - 2]
    assert columns == expected
    assert [tokens[c].lower() for c in columns if tokens[c].isascii()]


def test_words_of_several_tokens_have_all_their_columns(words):
    columns = token_columns(words, "a dog on white", "dog")
    tokens = words.convert_ids_to_tokens(words("a dog on white")["input_ids"])
    assert "".join(tokens[c] for c in columns) == "dog</w>"
    assert len(columns) > 1


def test_a_phrase_that_is_not_there_raises_with_the_tokens(words):
    with pytest.raises(GuidekitError, match=r"'blue' does not occur .* 1:a</w> 2:red</w>"):
        token_columns(words, "a red circle", "blue")
    with pytest.raises(GuidekitError, match="does not occur"):
        token_columns(words, "a red circle", "circl")


def test_a_phrase_that_is_cut_off_raises(words):
    with pytest.raises(GuidekitError, match="beyond the 77 tokens"):
        token_columns(words, "red " * 80 + "blue", "blue")


def test_missing_phrases_are_appended_once(words):
    segments = (Segment("red circle", MASK), Segment("Blue", MASK), Segment("green", MASK))
    condition = append_phrases(Condition("a blue square", segments=segments), words)
    assert condition.prompt == "a blue square red circle green"
    assert append_phrases(condition, words) == condition


def test_weights_have_a_column_for_each_segment(words):
    two = Condition(
        "a red circle and red", segments=(Segment("red", MASK), Segment("circle", MASK))
    )
    one = Condition("a circle", segments=(Segment("circle", MASK),))
    weights = segment_weights([words], [two, one], 77)
    assert weights.shape == (2, 77, 2)
    assert [weights[0, :, 0].nonzero().flatten().tolist(), weights[0, :, 1].argmax()] == [[2, 5], 3]
    assert weights[1, :, 0].nonzero().flatten().tolist() == [2]
    assert weights[1, :, 1].sum() == 0
    assert real_tokens([words], [two, one], 77).sum(1).tolist() == [7, 4]


def test_both_tokenizers_of_sdxl_must_agree(words, monkeypatch):
    pipe = tiny.sdxl_pipeline()
    condition = Condition("a red circle", segments=(Segment("red circle", MASK),))
    tokenizers = Sampling(pipe, condition, steps=1).denoiser.tokenizers
    assert len(tokenizers) == 2
    assert segment_columns(tokenizers, condition) == [[2, 3]]

    monkeypatch.setattr(text_encoders, "WORDS", ("red",))  # `circle` falls into letters
    other = tiny.tokenizer()
    with pytest.raises(GuidekitError, match="cut 'red circle' into different tokens"):
        segment_columns([words, other], condition)
