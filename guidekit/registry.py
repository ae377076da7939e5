"""Which plugins there are, and what they offer. Listing imports nothing; naming one imports it.

Plugins are entry points of the group `guidekit`. An entry's name is its namespace: entry `acme`
registers guidances `acme` and `acme.*`, and backbones for `--model acme:x`. GUIDEKIT_PLUGINS is a
list of third-party names that may be imported; empty allows the first-party ones only.
"""

import importlib.metadata
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pluggy

from guidekit import hookspecs
from guidekit.errors import GuidekitError, nearest
from guidekit.options import option_kinds, rooted

if TYPE_CHECKING:
    from guidekit.guidance import Guidance

Loader = Callable[[], Any]  # of a backbone


@dataclass(frozen=True)
class Entry:
    """A plugin as its distribution declares it."""

    name: str
    distribution: str
    version: str
    first_party: bool
    module: str


def entries() -> list[Entry]:
    """All installed plugins by name, read from metadata without importing them."""
    found = {}
    for point in importlib.metadata.entry_points(group=hookspecs.GROUP):
        dist = cast(importlib.metadata.Distribution, point.dist)  # None outside a distribution
        name = dist.name
        entry = Entry(point.name, name, dist.version, name == "guidekit", point.value)
        found[entry.name, entry.distribution] = entry
    return [found[key] for key in sorted(found)]


@dataclass
class Offers:
    """What one entry registered."""

    guidances: dict[str, type] = field(default_factory=dict)
    backbones: dict[str, Callable[[], Any]] = field(default_factory=dict)
    commands: list[Any] = field(default_factory=list)


class Registry:
    """Imports plugins by name and hands out what they registered; `blocked` names stay out.

    Raises GuidekitError for a blocked name that does not exist: it may be a misspelt one.
    """

    def __init__(self, blocked: Iterable[str] = ()):
        self._manager = pluggy.PluginManager(hookspecs.GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._blocked = set(blocked)
        self._offers: dict[str, Offers] = {}
        if self._blocked:
            exist = {entry.name for entry in entries()}
            for name in self._blocked:
                if name not in exist:
                    there = ", ".join(sorted(exist))
                    raise GuidekitError(f"--no-plugin {name}: no such plugin; there are {there}")
                self._manager.set_blocked(name)

    def load(self, name: str) -> Offers:
        """What the entry `name` offers; imports it at its first use.

        Raises GuidekitError for a name that does not exist, is not allowed or is offered twice, and
        for a plugin that cannot be imported or leaves its namespace.
        """
        if name not in self._offers:
            entry = self._entry(name)
            try:
                self._manager.load_setuptools_entrypoints(hookspecs.GROUP, name=name)
                self._manager.check_pending()
                self._offers[name] = self._collect(name)
            except (Exception, SystemExit) as error:
                if self._manager.has_plugin(name):
                    self._manager.unregister(name=name)
                first = (str(error) or "no message").splitlines()[0]
                raise GuidekitError(
                    f"plugin {name!r} of {entry.distribution} {entry.version} cannot be loaded: "
                    f"{type(error).__name__}: {first}"
                ) from error
        return self._offers[name]

    def _entry(self, name: str) -> Entry:
        """The one entry of this name that may be imported."""
        everything = entries()
        found = [entry for entry in everything if entry.name == name]
        if not found:
            exist = ", ".join(dict.fromkeys(entry.name for entry in everything))
            hint = nearest(name, [entry.name for entry in everything])
            raise GuidekitError(f"no plugin {name!r}{hint}; there are {exist}")
        if len(found) > 1:
            names = " and ".join(entry.distribution for entry in found)
            raise GuidekitError(f"plugin {name!r} is offered by {names}; uninstall all but one")
        if name in self._blocked:
            raise GuidekitError(f"plugin {name!r} is blocked by --no-plugin")
        allowed = os.environ.get("GUIDEKIT_PLUGINS", name)  # without it, every plugin
        if not found[0].first_party and name not in [part.strip() for part in allowed.split(",")]:
            raise GuidekitError(
                f"plugin {name!r} of {found[0].distribution} is not in GUIDEKIT_PLUGINS "
                f"({allowed or 'empty'}); add it there to allow it"
            )
        return found[0]

    def _collect(self, name: str) -> Offers:
        """Calls the hooks of one plugin."""
        offers = Offers()
        others = [p for n, p in self._manager.list_name_plugin() if p is not None and n != name]
        hooks = {
            "register_guidance": _guidance_adder(name, offers.guidances),
            "register_backbones": _backbone_adder(offers.backbones),
            "register_commands": offers.commands.append,
        }
        for hook, register in hooks.items():
            self._manager.subset_hook_caller(hook, others)(register=register)
        return offers

    def guidance_class(self, name: str) -> type["Guidance"]:
        """The guidance class registered as `name`."""
        offers = self.load(name.partition(".")[0] or name).guidances
        if name not in offers:
            raise GuidekitError(f"no guidance {name!r}; {_list(name.partition('.')[0], offers)}")
        return offers[name]

    def make_guidance(
        self,
        name: str,
        options: dict[str, Any],
        folder: Path = Path(),
        changes: dict[str, Any] | None = None,
    ) -> "Guidance":
        """A guidance from its options; a relative path among them is taken from `folder`.

        changes: options that win over those, whose paths start from the working folder. Raises
        GuidekitError that names the option at fault, or the plugins that exist.
        """
        cls, changes = self.guidance_class(name), changes or {}
        kinds = option_kinds(cls)
        for option in (*options, *changes):
            if option not in kinds:
                raise GuidekitError(
                    f"{name} has no option {option!r}{nearest(option, list(kinds))}; it has: "
                    f"{', '.join(kinds)}"
                )
        values = {k: rooted(v, kinds[k], folder) for k, v in options.items()} | changes
        # The class's own checks name the plugin, so the name is there before they run.
        guidance = cls.__new__(cls, **values)
        vars(guidance)["_name"] = name
        cls.__init__(guidance, **values)
        return guidance

    def backbone(self, name: str) -> Callable[[], Any]:
        """The loader of `acme:x`."""
        entry, _, own = name.partition(":")
        offers = self.load(entry).backbones
        if own not in offers:
            raise GuidekitError(f"no backbone {name!r}; {_list(entry, offers, ':')}")
        return offers[own]

    def commands(self, name: str) -> list[Any]:
        """The click commands of an entry."""
        return self.load(name).commands


def _list(entry: str, offers: dict[str, Any], separator: str = "") -> str:
    names = [f"{entry}{separator}{name}" if separator else name for name in offers]
    return f"{entry} registers {', '.join(names) or 'none'}"


def _guidance_adder(entry: str, table: dict[str, type]) -> Callable[[str, type], None]:
    """`register` of guidances, which keeps a plugin to its own names."""

    def register(name: str, cls: type) -> None:
        if name != entry and not name.startswith(f"{entry}."):
            raise GuidekitError(f"it registers {name!r}; its names are {entry!r} and {entry!r}.*")
        if name in table:
            raise GuidekitError(f"it registers {name!r} twice")
        table[name] = cls

    return register


def _backbone_adder(
    table: dict[str, Callable[[], Any]],
) -> Callable[[str, Callable[[], Any]], None]:
    """`register` of backbones, whose names get the entry's name and a colon in front."""

    def register(name: str, load: Callable[[], Any]) -> None:
        if ":" in name or name in table:
            raise GuidekitError(f"it registers the backbone {name!r} twice or with a colon")
        table[name] = load

    return register
