"""Refusals are one line and exit code 2; bugs name plugin, hook and step, and exit with 1."""

import pytest

from guidekit.errors import GuidekitError, blame, where_of


def test_a_bug_is_told_where_it_passed():
    with pytest.raises(KeyError) as caught, blame("acme", "energy", 3):
        raise KeyError("a")
    assert str(where_of(caught.value)) == "plugin acme, energy, step 3"
    assert caught.value.__notes__ == ["in plugin acme, energy, step 3"]


def test_the_innermost_hook_counts():
    with pytest.raises(KeyError) as caught, blame("acme", "energy", 3), blame("other", "prepare"):
        raise KeyError("a")
    assert str(where_of(caught.value)) == "plugin other, prepare"
    assert len(caught.value.__notes__) == 1


@pytest.mark.parametrize("error", [GuidekitError("no"), KeyboardInterrupt()])
def test_refusals_and_interrupts_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, blame("acme", "energy", 3):
        raise error
    assert where_of(caught.value) is None
