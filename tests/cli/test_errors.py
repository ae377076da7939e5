"""Refusals are one line and exit code 2; bugs name plugin, hook and step, and exit with 1."""

import pytest
from click.testing import CliRunner

from guidekit.__main__ import main
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


BUGGY = '''
"""Acme: a plugin with bugs."""

from dataclasses import dataclass

import click

import guidekit


@dataclass(kw_only=True)
class Acme(guidekit.Guidance):
    """Its bugs are ValueErrors, as Python's own often are."""

    scale: float = 1.0
    early: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.early:
            a, b = [1]

    def energy(self, step):
        a, b = [1]


@click.command()
def acme():
    """Fails."""
    a, b = [1]


@guidekit.hookimpl
def register_guidance(register):
    register("acme", Acme)


@guidekit.hookimpl
def register_commands(register):
    register(acme)
'''
MESSAGE = "ValueError: not enough values to unpack (expected 2, got 1)"


def run(*args, **options):
    """The result of a command given as words."""
    return CliRunner().invoke(main, [str(arg) for arg in args], **options)


@pytest.fixture
def draw(model, tmp_path, monkeypatch):
    """`draw(*words)`: the result of one step with the tiny model."""
    monkeypatch.chdir(tmp_path)
    words = ("sample", "--model", model, "--prompt", "a red", "--steps", 1, "--seeds", 0)
    return lambda *more, **options: run(*words, "--out", "o", *more, **options)


def test_a_strangers_bug_names_its_plugin_and_shows_the_traceback(install, draw, tmp_path):
    install("acme", BUGGY)
    result = draw("--plugin", "acme", "--set", "acme.early=true")
    first, *rest = result.stderr.splitlines()
    assert result.exit_code == 1
    assert first == f"error: plugin acme, options: a bug, {MESSAGE}"
    assert rest[0] == "Traceback (most recent call last):"
    assert "guidekit_acme_module.py" in result.stderr
    assert not (tmp_path / "o").exists()


def test_a_bug_in_a_hook_names_hook_and_step(install, draw):
    install("acme", BUGGY)
    first, second, *_ = draw("--plugin", "acme").stderr.splitlines()
    assert first == f"error: plugin acme, energy, step 0: a bug, {MESSAGE}"
    assert second == "Traceback (most recent call last):"


def test_a_plugins_command_is_blamed_too(install):
    install("acme", BUGGY)
    result = run("acme")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: plugin acme, command acme: a bug, {MESSAGE}\nTrace")


@pytest.fixture
def broken(monkeypatch):
    """A bug in a first-party file."""
    from guidekit.sampler import Sampling

    def step(self, *_):
        raise IndexError("index 7 is out of bounds\nfor a dimension")

    monkeypatch.setattr(Sampling, "_scheduler_step", step)


BUG = "error: guidekit has a bug, IndexError: index 7 is out of bounds"


def test_our_own_bug_is_one_line_that_says_how_to_see_more(draw, broken):
    result = draw()
    assert result.exit_code == 1
    assert result.stderr == f"{BUG}; see where with --traceback or GUIDEKIT_TRACEBACK=1\n"


@pytest.mark.parametrize("how", ["command", "group", "variable"])
def test_the_traceback_is_shown_where_it_is_wanted(model, draw, broken, how, monkeypatch):
    if how == "variable":
        monkeypatch.setenv("GUIDEKIT_TRACEBACK", "1")
    if how == "group":
        words = ("--model", model, "--prompt", "a red", "--steps", 1, "--seeds", 0)
        result = run("--traceback", "sample", *words)
    else:
        result = draw(*["--traceback"] * (how == "command"))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[:2] == [BUG, "Traceback (most recent call last):"]


def test_a_refusal_has_a_traceback_on_demand_alone(draw):
    assert len(draw("--cfg", "-1").stderr.splitlines()) == 1
    result = draw("--cfg", "-1", "--traceback")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    "words",
    [("fit",), ("augment",), ("train",), ("doctor",), ("plugins",), ("plugins", "show")],
)
def test_every_command_takes_traceback(words):
    assert "--traceback" in run(*words, "--help").stdout
