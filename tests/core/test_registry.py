"""Plugins by name: listed from metadata, imported alone, kept to their names."""

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from guidekit import Guidance
from guidekit.errors import GuidekitError
from guidekit.registry import Registry, entries


@dataclass(kw_only=True)
class Every(Guidance):
    """A guidance with an option of every type."""

    count: int = 1
    name_: str = "x"
    on: bool = False
    limit: float | None = None
    head: Path | None = None


PLUGIN = """
import guidekit
from guidekit import Guidance, hookimpl

class Acme(Guidance):
    pass

@hookimpl
def register_guidance(register):
    register("acme", Acme)
    register("acme.fast", Acme)

@hookimpl
def register_backbones(register):
    register("x", lambda: "a pipeline")

@hookimpl
def register_commands(register):
    import click
    register(click.Command("acme", callback=lambda: click.echo("hello from acme")))
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution with one plugin on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, source: str, distribution: str | None = None) -> None:
        distribution = distribution or f"guidekit-{name}"
        module = f"{distribution.replace('-', '_')}_module"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text(f"[guidekit]\n{name} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return make


def test_listing_imports_nothing(install):
    install("acme", "raise RuntimeError('imported')")
    found = {entry.name: entry for entry in entries()}
    assert found["zest"].first_party
    assert found["zest"].module == "guidekit_zest"
    assert not found["acme"].first_party
    assert (found["acme"].distribution, found["acme"].version) == ("guidekit-acme", "1.2")
    assert "guidekit_acme_module" not in sys.modules


def test_what_a_plugin_offers(install):
    install("acme", PLUGIN)
    registry = Registry()
    assert registry.make_guidance("acme.fast", {"scale": 2}).name == "acme.fast"
    assert registry.backbone("acme:x")() == "a pipeline"
    assert [c.name for c in registry.commands("acme")] == ["acme"]


def test_plugins_do_not_see_each_others_hooks(install):
    install("acme", PLUGIN)
    registry = Registry()
    registry.load("zest")
    registry.load("acme")
    assert list(registry.load("zest").guidances) == ["zest"]
    assert list(registry.load("acme").guidances) == ["acme", "acme.fast"]


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (
            "raise RuntimeError('broken')",
            "guidekit-acme 1.2 cannot be loaded: RuntimeError: broken",
        ),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("import a_module_that_is_missing", "ModuleNotFoundError"),
        (PLUGIN.replace('"acme.fast"', '"zest"'), "it registers 'zest'; its names are 'acme'"),
        (PLUGIN.replace('"acme.fast"', '"acme"'), "twice"),
        (PLUGIN.replace("register_guidance", "register_guidnace"), "register_guidnace"),
        (PLUGIN.replace("(register)", "(registre)", 1), "PluginValidationError"),
    ],
)
def test_a_broken_stranger_breaks_nothing_else(install, source, match):
    install("acme", source)
    registry = Registry()
    with pytest.raises(GuidekitError, match="guidekit-acme") as error:
        registry.load("acme")
    assert error.match(match)
    assert registry.make_guidance("zest", {}).name == "zest"


def test_one_name_from_two_distributions(install):
    install("acme", PLUGIN)
    install("acme", PLUGIN, "other-acme")
    with pytest.raises(GuidekitError, match="guidekit-acme and other-acme|other-acme and guidekit"):
        Registry().load("acme")


@pytest.mark.parametrize(("allowed", "works"), [("", False), ("other", False), ("b, acme", True)])
def test_the_allow_list(install, monkeypatch, allowed, works):
    install("acme", PLUGIN)
    monkeypatch.setenv("GUIDEKIT_PLUGINS", allowed)
    assert Registry().make_guidance("zest", {}).name == "zest"
    if works:
        Registry().load("acme")
        return
    with pytest.raises(GuidekitError, match="not in GUIDEKIT_PLUGINS"):
        Registry().load("acme")
    assert "guidekit_acme_module" not in sys.modules


def test_a_blocked_plugin():
    with pytest.raises(GuidekitError, match="blocked by --no-plugin"):
        Registry(blocked=["zest"]).load("zest")


def test_names_that_do_not_exist():
    with pytest.raises(GuidekitError, match="no plugin 'nope'; there are .*zest"):
        Registry().guidance_class("nope")
    with pytest.raises(GuidekitError, match="no guidance 'zest.fast'; zest registers zest"):
        Registry().guidance_class("zest.fast")
    with pytest.raises(GuidekitError, match="no backbone 'zest:x'; zest registers none"):
        Registry().backbone("zest:x")


def test_an_unknown_option():
    with pytest.raises(
        GuidekitError, match=r"option 'scal' \(the nearest is scale\); it has: scale, st"
    ):
        Registry().make_guidance("zest", {"scal": 2})


@pytest.fixture
def every(monkeypatch):
    registry = Registry()
    monkeypatch.setattr(registry, "guidance_class", lambda name: Every)
    return lambda **options: registry.make_guidance("every", options)


def test_options_take_the_types_of_their_fields(every):
    made = every(scale="2", count="3", name_=7, on="true", limit="0.5")
    assert (made.scale, made.count, made.name_, made.on, made.limit) == (2.0, 3, "7", True, 0.5)
    assert made.name == "every"
    assert type(made.scale) is float


def test_paths_are_relative_to_the_file_that_names_them(monkeypatch):
    registry = Registry()
    monkeypatch.setattr(registry, "guidance_class", lambda name: Every)
    made = registry.make_guidance("every", {"head": "heads/fox"}, Path("/base"))
    assert made.head == Path("/base/heads/fox")


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("scale", "x", "every.scale must be a number, not 'x'"),
        ("count", 1.5, "every.count must be a whole number"),
        ("on", 1, "every.on must be true or false"),
        ("scale", float("nan"), "every.scale must be a finite number"),
    ],
)
def test_options_of_another_type(every, option, value, match):
    with pytest.raises(GuidekitError, match=match):
        every(**{option: value})
