"""Objects that an option names by an import path, MODULE:NAME: code of the user's own.

Files of others never name any: `guidekit.cli.plan` and `guidekit serve` see to that.
"""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from guidekit.errors import GuidekitError


def named(given: object, where: str, known: Mapping[str, Any] | None = None) -> Any:
    """The object of a `known` name or of an import path MODULE:NAME; what is no text, itself.

    where: the option, for messages. Raises GuidekitError for a text that names nothing.
    """
    known = known or {}
    if not isinstance(given, str):
        return given
    if given in known:
        return known[given]
    module, colon, name = given.partition(":")
    try:
        if not colon:
            raise ImportError(name)
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        there = "".join(f", {name}" for name in known)
        why = f" ({type(error).__name__}: {error})" if colon else ""
        raise GuidekitError(f"{where} {given!r}: write MODULE:NAME{there}{why}") from None
