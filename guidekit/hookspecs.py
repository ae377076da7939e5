"""The three hooks of a plugin. pluggy registers; sampling itself runs plain Python.

A plugin is a module with functions of these names, marked `@guidekit.hookimpl`, offered by its
distribution under the entry-point group `guidekit`. The entry's name is the plugin's namespace.
"""

from collections.abc import Callable
from typing import Any

import pluggy

GROUP = "guidekit"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def register_guidance(register: Callable[[str, type], None]) -> None:
    """Call `register(name, cls)` for each guidance class.

    `name` is the entry's name, or begins with it and a dot: entry `acme` may register `acme` and
    `acme.fast`.
    """


@hookspec
def register_backbones(register: Callable[[str, Callable[[], Any]], None]) -> None:
    """Call `register(name, load)` for each backbone.

    `load()` returns a diffusers pipeline; users say `--model acme:name`.
    """


@hookspec
def register_commands(register: Callable[[Any], None]) -> None:
    """Call `register(command)` for each click command.

    Users say `guidekit acme ...`; with several commands the entry's name is a group of them.
    """
