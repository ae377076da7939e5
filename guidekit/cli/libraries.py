"""What to say where a library cannot be imported: mostly torch and torchvision that do not fit."""

import importlib.metadata
import traceback
from collections.abc import Iterator

#: Libraries whose versions have to fit each other, as they are imported and as pip calls them.
LIBRARIES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "open_clip": "open_clip_torch",
    "timm": "timm",
}


def broken_import(error: BaseException) -> str | None:
    """The line for an error that a library raised while it was imported; None for any other."""
    for cause in _causes(error):
        library = _missing(cause) or _importing(cause)
        if library is not None:
            first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            return (
                f"{library} cannot be imported ({type(cause).__name__}: {first}); these versions "
                f"have to fit: {_versions()}; reinstall torch and torchvision together, from one "
                "index"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The first cause of an error, and what came of it: transformers wraps what it meets."""
    chain = []
    while error is not None:
        chain.append(error)
        hidden = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or hidden
    return reversed(chain)


def _missing(error: BaseException) -> str | None:
    """A library that is not installed."""
    name = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    return name if name in LIBRARIES else None


def _importing(error: BaseException) -> str | None:
    """The library of the last module that was being run, from top to bottom, at the error."""
    frames = traceback.extract_tb(error.__traceback__)
    modules = [frame.filename for frame in frames if frame.name == "<module>"]
    parts = modules[-1].replace("\\", "/").split("/") if modules else []
    return next((name for name in LIBRARIES if name in parts[:-1]), None)


def _versions() -> str:
    """Those that are installed."""
    return ", ".join(f"{name} {_version(pip)}" for name, pip in list(LIBRARIES.items())[:4])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(none)"
