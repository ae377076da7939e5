"""What guidekit refuses, and whose code an exception that is no refusal came out of."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


class GuidekitError(ValueError):
    """Input that cannot work: the message says what is wrong, what exists and what to do.

    The command line shows these in one line. Any other exception is a bug, of guidekit or of a
    plugin, and is shown as one.
    """


class NonFiniteError(GuidekitError, ArithmeticError):
    """Images or gradients are NaN or infinite."""


class NoPushError(GuidekitError):
    """At this step no change of the output moves the next sample."""


@dataclass(frozen=True)
class Where:
    """The call of a plugin that an exception passed through."""

    #: Name of the guidance, as the user gave it.
    plugin: str
    #: Name of the method.
    hook: str
    #: Index of the step, from 0; None outside of the steps.
    step: int | None = None

    def __str__(self) -> str:
        when = "" if self.step is None else f", step {self.step}"
        return f"plugin {self.plugin}, {self.hook}{when}"


@contextlib.contextmanager
def blame(plugin: str, hook: str, step: int | None = None) -> Iterator[None]:
    """Around a call of a plugin's hook: an exception that is no refusal is told where it passed.

    It gets a note, which every traceback shows, and the attribute `guidekit_where`, which
    `where_of` reads. The innermost call counts; GuidekitError passes as it is.
    """
    try:
        yield
    except GuidekitError:
        raise
    except Exception as error:
        if where_of(error) is None:
            where = vars(error)["guidekit_where"] = Where(plugin, hook, step)
            error.add_note(f"in {where}")
        raise


def where_of(error: BaseException) -> Where | None:
    """The hook call that an exception came out of, where `blame` saw it."""
    return getattr(error, "guidekit_where", None)


def nearest(word: str, names: Iterable[str]) -> str:
    """` (the nearest is NAME)`, or nothing where no name is near.

    names: those that exist, or spellings of them with the name of each.
    """
    found = difflib.get_close_matches(word, list(names), 1)
    called = names if isinstance(names, Mapping) else {}
    return f" (the nearest is {called.get(found[0], found[0])})" if found else ""
