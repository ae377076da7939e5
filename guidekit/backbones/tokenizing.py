"""One thread at a time reads by a tokenizer: the runs on a model share it.

A fast tokenizer keeps how it pads and cuts between calls, and each call sets that anew, so what one
thread asks for would reach the text of another.
"""

import threading
from typing import Any

TOKENIZING = threading.RLock()


def tokenized(tokenizer: Any, text: str, **options: Any) -> Any:
    """What the tokenizer answers for a text, while no other thread calls one."""
    with TOKENIZING:
        return tokenizer(text, **options)
