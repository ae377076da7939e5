"""Columns are those of what the text encoders got: inversions, occurrences, scripts, by hand."""

from dataclasses import dataclass

import pytest
import torch

import tiny
from guidekit import Condition, Guidance, Sampling, Segment, attach, box_mask
from guidekit.backbones.phrases import places
from guidekit.backbones.tokens import append_phrases, segment_columns, token_columns
from guidekit.errors import GuidekitError
from guidekit.layouts import parse_layout
from guidekit.testing import text_encoders
from guidekit_zest import Zest

LEFT, RIGHT = box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0, 1, 1))
TOY = "a <toy> and a red circle"


def with_toy(pipe, vectors=3):
    """The pipeline with an inversion of several vectors in every text encoder."""
    torch.manual_seed(0)
    if hasattr(pipe, "tokenizer_2"):
        pipe.tokenizer_2 = tiny.tokenizer()  # the miniature has one for both
    for end in ("", "_2"):
        if encoder := getattr(pipe, f"text_encoder{end}", None):
            pipe.load_textual_inversion(
                {"<toy>": torch.randn(vectors, encoder.config.hidden_size)},
                token="<toy>",
                tokenizer=getattr(pipe, f"tokenizer{end}"),
                text_encoder=encoder,
            )
    return pipe


def toys(*phrases):
    return Condition(TOY, segments=tuple(Segment(p, LEFT) for p in phrases))


def encoded_words(pipe, prompt):
    """The tokens that the first text encoder gets, column by column."""
    kept = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    pipe.encode_prompt(prompt, "cpu", 1, False)
    handle.remove()
    return pipe.tokenizer.convert_ids_to_tokens(kept[0][0].tolist())


def read_columns(run):
    """Columns with weight in each segment of the first read."""
    weights = run.reads.asked[0].read.weights[0]
    return [weights[:, s].nonzero().flatten().tolist() for s in range(weights.shape[1])]


@pytest.mark.parametrize("build", [tiny.sd_pipeline, tiny.sdxl_pipeline])
def test_textual_inversion_with_several_vectors(build):
    pipe = with_toy(build())
    condition = toys("<toy>", "red circle")
    run = Sampling(pipe, condition, [Zest(stop=1.0)], seeds=[0], steps=2).finish().run
    assert read_columns(run) == [[2, 3, 4], [7, 8]]
    with attach(pipe, [Zest(stop=1.0)], segments=condition.segments) as attached:
        pipe(TOY, num_inference_steps=2, output_type="latent")
    assert read_columns(attached.run) == [[2, 3, 4], [7, 8]]


def test_the_columns_of_inversions_are_those_of_the_encoder():
    pipe = with_toy(tiny.sd_pipeline())
    words = encoded_words(pipe, TOY)
    assert [words[i] for i in (2, 3, 4, 7, 8)] == [
        "<toy>",
        "<toy>_1",
        "<toy>_2",
        "red</w>",
        "circle</w>",
    ]


def test_written_out_inversions_count_towards_the_length():
    pipe = with_toy(tiny.sd_pipeline(), vectors=40)
    with pytest.raises(GuidekitError, match="the prompt has 85 tokens, the text encoder reads 77"):
        Sampling(pipe, Condition("<toy> <toy> a red circle"), seeds=[0], steps=2)


@dataclass(kw_only=True)
class Bright(Guidance):
    """Reads no phrases."""

    def energy(self, step):
        return step.x0.mean((1, 2, 3))


def test_another_reading_of_the_prompt_is_refused(monkeypatch):
    """A pipeline whose own encoding says something else than the prompt."""
    pipe = tiny.sd_pipeline()
    plain = pipe.encode_prompt
    monkeypatch.setattr(
        pipe, "encode_prompt", lambda prompt, *a, **k: plain(["white " + prompt[0]], *a, **k)
    )
    asked = Condition("a red circle", segments=(Segment("red circle", LEFT),))
    with pytest.raises(
        GuidekitError, match="columns of phrases are wrong.*white</w> a</w> red</w>"
    ):
        Sampling(pipe, asked, [Zest(stop=1.0)], seeds=[0], steps=2).finish()
    by_hand = Condition("a red circle", segments=(Segment("red circle", LEFT, tokens=(3, 4)),))
    run = Sampling(pipe, by_hand, [Zest(stop=1.0)], seeds=[0], steps=2).finish().run
    assert read_columns(run) == [[3, 4]]
    Sampling(pipe, asked.prompt, [Bright()], seeds=[0], steps=2).finish()  # no phrase is read


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


def columns(words, prompt, *segments):
    return segment_columns([words], Condition(prompt, segments=segments))


TWICE = "a red circle and a red circle"


def test_the_nth_segment_of_a_phrase_has_its_nth_occurrence(words):
    two = (Segment("red circle", LEFT), Segment("Red  circle", RIGHT))
    assert columns(words, TWICE, *two) == [[2, 3], [6, 7]]
    assert columns(words, TWICE, two[0]) == [[2, 3, 6, 7]]
    for prompt, count in (("a red circle", 1), (f"{TWICE} and a red circle", 3)):
        with pytest.raises(GuidekitError, match=f"2 segments .* occurs {count} times"):
            columns(words, prompt, *two)


def test_occurrence_and_tokens_by_hand(words):
    second, first = (Segment("red circle", LEFT, occurrence=n) for n in (2, 1))
    assert columns(words, TWICE, second, first) == [[6, 7], [2, 3]]
    by_hand = Segment("the circle", LEFT, tokens=(7, 3))
    assert columns(words, TWICE, by_hand, second) == [[3, 7], [6, 7]]
    with pytest.raises(GuidekitError, match="occurrence 3 of 'red circle': it occurs 2 times"):
        columns(words, TWICE, Segment("red circle", LEFT, occurrence=3))
    with pytest.raises(GuidekitError, match="token 77, and the text has columns 0 to 76"):
        columns(words, TWICE, Segment("red", LEFT, tokens=(77,)))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"tokens": ()}, "tokens are columns"),
        ({"tokens": (1, -1)}, "tokens are columns"),
        ({"tokens": (1.0,)}, "tokens are columns"),
        ({"occurrence": 0}, "occurrence is a whole number from 1"),
        ({"occurrence": True}, "occurrence is a whole number from 1"),
        ({"occurrence": 1, "tokens": (1,)}, "not both"),
    ],
)
def test_impossible_tokens_and_occurrences(given, message):
    with pytest.raises(GuidekitError, match=message):
        Segment("red", LEFT, **given)


def test_layouts_have_tokens_and_occurrences(tmp_path):
    entries = [
        {"phrase": "red", "box": [0, 0, 1, 1], "tokens": [4, 5]},
        {"phrase": "red", "box": [0, 0, 1, 1], "occurrence": 2},
    ]
    segments = parse_layout({"segments": entries}, tmp_path, "layout").segments
    assert [(s.tokens, s.occurrence) for s in segments] == [((4, 5), None), (None, 2)]
    for wrong in ({"tokens": 4}, {"occurrence": "2"}, {"tokens": ["4"]}):
        with pytest.raises(GuidekitError, match=f"layout: segment 0: .*{next(iter(wrong))}"):
            parse_layout({"segments": [entries[0] | {"tokens": None} | wrong]}, tmp_path, "layout")


def test_missing_occurrences_are_appended(words):
    two = (Segment("red", LEFT), Segment("red", RIGHT), Segment("x", LEFT, tokens=(1,)))
    condition = append_phrases(Condition("a red circle", segments=two), words)
    assert condition.prompt == "a red circle red"
    assert segment_columns([words], condition) == [[2], [4], [1]]


@pytest.mark.parametrize(
    "prompt, phrase, count",
    [
        ("一个红色的圆形和一个蓝色的方块", "红色的圆形", 1),
        ("赤い丸と青い四角と赤い丸", "赤い丸", 2),
        ("วงกลมสีแดงและสี่เหลี่ยมสีน้ำเงิน", "สีแดง", 1),
        ("红色的cat在左边", "cat", 1),
        ("a cathedral", "cat", 0),
        ("a 红色的cathedral", "cat", 0),
        ("naïveté", "naïve", 0),
        ("a red-circle", "red", 1),
    ],
)
def test_words_are_whole_where_their_script_divides_words(prompt, phrase, count):
    found = places(prompt, phrase)
    assert len(found) == count
    assert all(prompt[a:b] == phrase for a, b in found)


@pytest.mark.parametrize(
    "prompt, phrase",
    [
        ("一个红色的圆形和一个蓝色的方块", "红色的圆形"),
        ("赤い丸と青い四角", "青い四角"),
        ("วงกลมสีแดงและสี่เหลี่ยม", "สีแดง"),
    ],
)
def test_scripts_without_spaces_on_a_tokenizer_of_bytes(prompt, phrase):
    tokenizer = text_encoders.qwen_tokenizer()
    found = token_columns(tokenizer, prompt, phrase)
    ids = tokenizer(prompt)["input_ids"]
    assert tokenizer.decode([ids[i] for i in found]) == phrase
    assert found == list(range(found[0], found[-1] + 1))
    asked = Condition(prompt, segments=(Segment(phrase, LEFT),))
    assert append_phrases(asked, tokenizer) == asked
    with pytest.raises(GuidekitError, match="does not occur.*:[一赤ว]"):
        token_columns(tokenizer, prompt, "没有")


def test_a_script_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(GuidekitError, match="tokenizer does not know '红色'"):
        token_columns(text_encoders.t5_tokenizer(), "a 红色 circle", "红色")
