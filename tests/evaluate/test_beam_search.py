"""The beam search finds what a closed form says; knobs, scores, and what is refused."""

import math

import pytest

from guidekit.errors import GuidekitError
from guidekit.evaluate.scores import Score, mean_score, parse_score
from guidekit.evaluate.search import Knob, beam_search, parse_knob

A, B = Knob("p", "a", 0.25, 8.0), Knob("p", "b", 0.001, 1.0, 10.0)


def test_it_climbs_to_the_highest_and_asks_once_for_each():
    asked = []

    def score(values):
        asked.append(values)
        return -((math.log2(values[0]) - 1) ** 2) - (math.log10(values[1]) + 2) ** 2

    best = beam_search([A, B], score, width=2, rounds=6)
    assert best == pytest.approx((2.0, 0.01))
    assert len(asked) == len(set(asked))
    assert all(a <= 8 and b <= 1 for a, b in asked)


def test_no_rise_ends_it_and_no_number_is_the_lowest():
    asked = []

    def falling(values):
        asked.append(values)
        return -values[0]

    assert beam_search([A], falling, width=1) == (0.25,)
    assert len(asked) == 2
    assert beam_search([A], lambda v: math.nan if v[0] > 0.3 else 0.0, width=1) == (0.25,)


def test_a_wider_beam_passes_a_dip():
    def dip(values):
        return {0.25: 1.0, 0.5: 0.5, 1.0: 2.0}.get(values[0], 0.0)

    assert beam_search([A], dip, width=1) == (0.25,)
    assert beam_search([A], dip, width=2) == (1.0,)


def test_the_cap_is_kept():
    assert beam_search([Knob("p", "a", 1.0, 4.0)], lambda v: v[0], rounds=9) == (4.0,)


def test_knobs():
    value = {"scale": 4.0, "way": "soft", "on": True}
    here = lambda plugin, option: value[option]  # noqa: E731
    assert parse_knob("p.scale", here) == Knob("p", "scale", 1.0, 32.0, 2.0)
    assert parse_knob("p.scale=0.5", here) == Knob("p", "scale", 0.5, 32.0, 2.0)
    assert parse_knob("p.scale=0.5:2:10", here) == Knob("p", "scale", 0.5, 2.0, 10.0)
    for text, says in [
        ("scale", "write PLUGIN.OPTION"),
        ("p.way", "only numbers are tuned"),
        ("p.on", "only numbers are tuned"),
        ("p.scale=a", "are numbers"),
        ("p.scale=4:2", "at most the cap"),
        ("p.scale=0:2", "above 0"),
    ]:
        with pytest.raises(GuidekitError, match=says):
            parse_knob(text, here)


def test_scores():
    found = parse_score("quality real=scenes")
    assert (found.measure, found.column) == ("quality", "Frechet")
    assert found.options == {"real": "scenes", "features": "scenes-judge", "draws": 0}
    assert parse_score("inverse.SSIM real=a").column == "SSIM"
    for text, says in [
        ("beauty", "no measure 'beauty'; there are prompts"),
        ("quality", "needs real="),
        ("prompts real=a", "'real=a' is none of its options, clip"),
    ]:
        with pytest.raises(GuidekitError, match=says):
            parse_score(text)


def test_two_judges_of_one_measure_both_count(monkeypatch, tmp_path):
    given = {"clip": 1.0, "other": 3.0}
    monkeypatch.setattr(Score, "of", lambda self, folder: given[self.options["clip"]])
    judges = [parse_score(f"prompts clip={name}") for name in given]
    mean, each = mean_score(judges, tmp_path)
    assert mean == 2.0
    assert each == {"prompts clip=clip": 1.0, "prompts clip=other": 3.0}
