"""Whether a loader found every weight: diffusers and transformers draw those that a file lacks."""

import contextlib
import logging
import re
import threading
from collections.abc import Iterator

import diffusers
import transformers

from guidekit.errors import GuidekitError

MADE_UP = "newly initialized"  # in the warnings of both, which many silence
WHOSE = re.compile(r"([A-Z]\w*) LOAD REPORT|weights of ([A-Z]\w*)")
_ALONE = threading.RLock()  # loggers are the process's


class _Listener(logging.Handler):
    """Keeps the warnings of weights that were drawn; passes others on as they were shown before."""

    def __init__(self, logger: logging.Logger):
        super().__init__()
        self.logger, self.level_before = logger, logger.level
        self.handlers = list(logger.handlers)
        self.drawn: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if MADE_UP in message:
            whose = WHOSE.search(message)
            self.drawn.append(whose[1] or whose[2] if whose else "a model")
        elif record.levelno >= self.level_before:
            for handler in self.handlers:
                handler.handle(record)

    def __enter__(self) -> "_Listener":
        self.logger.handlers = [self]
        self.logger.setLevel(min(self.level_before, logging.WARNING))
        return self

    def __exit__(self, *raised: object) -> None:
        self.logger.handlers = self.handlers
        self.logger.setLevel(self.level_before)


@contextlib.contextmanager
def whole(what: str = "") -> Iterator[None]:
    """Loads inside find all weights of their models in the files, also where warnings are silenced.

    what: as the message calls it. Raises GuidekitError that names the models whose weights were
    drawn at random instead.
    """
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    with _ALONE, _Listener(loggers[0]) as first, _Listener(loggers[1]) as second:
        yield
    if drawn := sorted({*first.drawn, *second.drawn}):
        versions = f"transformers {transformers.__version__}, diffusers {diffusers.__version__}"
        raise GuidekitError(
            f"{what and what + ' cannot be loaded: '}the files lack weights of "
            f"{', '.join(drawn)}, or name them as another version does (here {versions}); "
            "download the model again, or upgrade both"
        )
