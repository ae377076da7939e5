"""A denoiser compiled for a while by torch.compile, and afterwards as it was.

Between the taps and torch.compile: see `guidekit.taps`, whose wrappers stay for the length of a
run, so that what was compiled at the first step holds for all of them.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from guidekit.errors import GuidekitError

#: What `compile=True` stands for, torch.compile's own default.
BACKEND = "inductor"
#: Where `module.compile()` keeps what it made.
_KEPT = "_compiled_call_impl"


@dataclass
class _Held:
    """How many runs hold a module that was compiled for them."""

    backend: str
    holders: int = 0


_COMPILED: "WeakKeyDictionary[nn.Module, _Held]" = WeakKeyDictionary()
_COMPILING = threading.Lock()


def as_backend(wanted: bool | str | None) -> str | None:
    """The backend of torch.compile that is asked for, None for none.

    Raises GuidekitError for one that there is not.
    """
    if not wanted:
        return None
    if wanted is True:
        return BACKEND
    from torch.compiler import list_backends

    if wanted not in (known := list_backends(exclude_tags=())):
        raise GuidekitError(f"no compiler backend {wanted!r}; there are {', '.join(known)}")
    return wanted


@contextlib.contextmanager
def compiled(network: nn.Module, backend: str | None) -> Iterator[None]:
    """Calls of the network are compiled inside the context; None leaves it alone.

    It is counted, as `frozen` is: the last run that holds a module gives it back. One that the user
    has compiled stays as it is.
    """
    if backend is None or _by_user(network):
        yield
        return
    with _COMPILING:
        held = _COMPILED.setdefault(network, _Held(backend))
        held.holders += 1
        if held.holders == 1:
            network.compile(backend=backend)
    try:
        yield
    finally:
        with _COMPILING:
            held.holders -= 1
            if not held.holders:
                del _COMPILED[network]
                vars(network).pop(_KEPT, None)


def _by_user(network: nn.Module) -> bool:
    """Whether the user has compiled it, in place or as a module round it."""
    kept = getattr(network, _KEPT, None) is not None
    return hasattr(network, "_orig_mod") or (kept and network not in _COMPILED)
