"""`guidekit.sample` shows editors and type checkers what it takes."""

import inspect

import guidekit


def test_sample_takes_what_sampling_takes():
    assert inspect.signature(guidekit.sample) == inspect.signature(guidekit.Sampling)
