"""The contract between the engine and the author of a guidance: options, hooks, presets."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from guidekit import Condition, Guidance, GuidekitError, Sampling
from guidekit.testing import sd_pipeline


@dataclass(kw_only=True)
class Typed(Guidance):
    """Options of every kind."""

    mode: Literal["soft", "hard"] = "soft"
    sites: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    head: Path | None = None
    limit: float | None = None
    preset: str = ""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"strong": {"scale": 3.0, "mode": "hard"}}


def test_options_take_their_types_from_python_too():
    made = Typed(sites="a, b", sizes="32,16", head="folder", limit="0.5", scale=2)
    assert made.sites == ("a", "b")
    assert made.sizes == (32, 16)
    assert made.head == Path("folder")
    assert made.limit == 0.5
    assert isinstance(made.scale, float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sofd"}, "typed.mode must be one of soft, hard, not 'sofd'"),
        ({"sizes": "a"}, "typed.sizes must be a list, each a whole number"),
        ({"scale": "x"}, "typed.scale must be a number"),
        ({"scale": float("nan")}, "typed.scale must be a finite number"),
        ({"stop": 2}, "start and stop are fractions"),
        ({"preset": "weak"}, "typed has no preset 'weak'; it has strong"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(GuidekitError, match=message):
        Typed(**options)


def test_a_preset_overrides_nothing_that_was_given():
    assert Typed(preset="strong").scale == 3.0
    given = Typed(preset="strong", scale=1.0)  # the default's own value, but given
    assert given.scale == 1.0
    assert given.mode == "hard"
    assert replace(given, start=0.5).scale == 1.0


def drawn(guidance):
    return Sampling(sd_pipeline(), Condition("a red circle"), [guidance], seeds=[0], steps=1)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"graph": "xo"}, "misspelt.graph is 'xo'; it is one of x0, attention, features, input"),
        ({"needs": ("txt",)}, "misspelt.needs names 'txt'; there are text, cross-attention"),
    ],
)
def test_a_misspelt_graph_or_need_is_refused_where_a_run_takes_it(attributes, message):
    cls = dataclass(kw_only=True)(type("Misspelt", (Guidance,), attributes))
    with pytest.raises(GuidekitError, match=message):
        drawn(cls())


@pytest.mark.parametrize("name", ["enrgy", "energyy", "enegry", "enargy", "pusch", "edit_atention"])
def test_a_method_one_edit_from_a_hook_is_refused(name):
    with pytest.raises(GuidekitError, match="would never be called: the hook is"):
        type("Misspelt", (Guidance,), {name: lambda self, step: None})


def test_an_option_with_the_name_of_a_hook_is_refused():
    with pytest.raises(GuidekitError, match="schedule is the name of a hook"):
        type("Misspelt", (Guidance,), {"schedule": "cosine"})


def test_other_methods_are_the_authors_own():
    cls = type("Own", (Guidance,), {"towards": lambda self: self, "_enrgy": lambda self: None})
    assert not cls.overrides("energy")
    assert type("Pull", (Guidance,), {"energy": lambda self, step: None}).overrides("energy")
