"""Errors as people see them: refusals in one line, bugs with the place that they came from."""

import contextlib
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import click
from safetensors import SafetensorError

from guidekit.cli.libraries import broken_import
from guidekit.cli.terminal import say
from guidekit.errors import GuidekitError, where_of

VARIABLE = "GUIDEKIT_TRACEBACK"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk says
ROOM = "free some space, or choose another folder with --out"


@dataclass
class Tracebacks:
    """Whether every error is shown with its traceback: --traceback, or GUIDEKIT_TRACEBACK=1."""

    wanted: bool = field(default_factory=lambda: os.environ.get(VARIABLE, "0") not in ("", "0"))


def traceback_option(command: Callable) -> Callable:
    """Adds --traceback to a command."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Tracebacks).wanted = True

    return click.option(
        "--traceback",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        help=f"Show where an error comes from, as {VARIABLE}=1 does.",
    )(command)


@contextlib.contextmanager
def shown_errors(tracebacks: Tracebacks) -> Iterator[None]:
    """One line on stderr; exit code 2 for bad input, 1 for a bug, 130 for Ctrl-C."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warned
            yield
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        sys.exit(0)
    except click.Abort:
        say("stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:  # `guidekit plugins | head`
        sys.stdout = None
        sys.exit(1)
    except Exception as error:
        _exit(error, tracebacks)


def _warned(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line, in place of Python's own; none with --quiet."""
    ctx = click.get_current_context(silent=True)
    if ctx is not None and ctx.params.get("quiet"):
        return
    say("warning: " + " ".join(str(message).split()), err=True)


def _exit(error: Exception, tracebacks: Tracebacks) -> None:
    """Says what went wrong, and exits with 2 or 1."""
    refusal = _refusal(error)
    shown = tracebacks.wanted or (refusal is None and _of_a_stranger(error))
    text = _bug(error, shown) if refusal is None else refusal
    say("error: " + " ".join(text.split()), err=True)
    if shown:
        say("".join(traceback.format_exception(error)).rstrip(), err=True)
    sys.exit(1 if refusal is None else 2)


def _refusal(error: Exception) -> str | None:
    """The line for what users can cause; None for anything else, which is a bug."""
    if isinstance(error, click.UsageError):
        command = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return error.format_message() + command
    if isinstance(error, click.ClickException):
        return error.format_message()
    text = None
    if isinstance(error, GuidekitError):
        text = broken_import(error) or str(error)  # what a plugin could not import
    elif isinstance(error, OSError):
        text = _file_error(error)
    elif isinstance(error, SafetensorError):  # it does not say which file
        text = _weights_error(error)
    elif isinstance(error, RuntimeError) and _out_of_memory(error):
        text = f"not enough memory; try --batch 1 or --memory low ({_first_line(error)})"
    elif isinstance(error, RuntimeError) and str(error).startswith("attention "):
        text = str(error)  # an implementation that cannot run here
    else:
        text = broken_import(error)
    return None if text is None else "; ".join([text, *_notes(error)])


def _bug(error: Exception, shown: bool) -> str:
    """The line for an error that nobody meant to raise."""
    whose = "guidekit has a bug" if where_of(error) is None else f"{where_of(error)}: a bug"
    text = f"{whose}, {type(error).__name__}: {_first_line(error)}"
    hint = "" if shown else f"see where with --traceback or {VARIABLE}=1"
    return "; ".join(filter(None, [text, *_notes(error), hint]))


def _notes(error: Exception) -> list[str]:
    """What was added to an error on its way, but for the hook, which the line begins with."""
    notes = getattr(error, "__notes__", [])
    return [note for note in notes if note != f"in {where_of(error)}"]


def _of_a_stranger(error: Exception) -> bool:
    """Whether the error came out of a third-party plugin, whose author needs the traceback."""
    from guidekit.registry import entries

    where = where_of(error)
    name = None if where is None else where.plugin.partition(".")[0]
    return any(entry.name == name and not entry.first_party for entry in entries())


def _file_error(error: OSError) -> str:
    """What went wrong with which file, and what to do if the disk is full."""
    told = (error.filename, error.strerror)  # the name may be a Path
    text = ": ".join(str(part) for part in told if part) or str(error)
    return f"{text}; {ROOM}" if error.errno in FULL else text


def _weights_error(error: SafetensorError) -> str:
    """What went wrong with weights: the disk was full while they were written, or they are damaged.

    safetensors tells both by one exception, the first with the system's number in its text.
    """
    number = re.search(r"os error (\d+)", str(error))
    if number and int(number[1]) in FULL:
        return f"weights could not be written ({_first_line(error)}); {ROOM}"
    return f"a file of weights is damaged ({error}); download or save it again"


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether the device's or the computer's memory is full."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
