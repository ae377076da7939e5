"""What the text encoders really got: their ids, noted while the pipeline encodes."""

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from guidekit.errors import GuidekitError


@contextlib.contextmanager
def received(encoders: Mapping[str, nn.Module | None]) -> Iterator[dict[str, list[list[int]]]]:
    """Rows of ids by the encoder's name, of every call inside."""
    rows: dict[str, list[list[int]]] = {}

    def note(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor) and ids.ndim == 2:
                rows.setdefault(name, []).extend(ids.tolist())

        return hook

    handles = [
        encoder.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, encoder in encoders.items()
        if encoder is not None
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def check_received(ids: list[int], rows: list[list[int]], tokenizer, who: str) -> None:
    """Raises GuidekitError unless some row begins with the ids of a prompt.

    A row may be padded, or shorter than the prompt; then its last id is that of the end.
    """
    if any(_begins(row, ids) for row in rows):
        return
    wanted, got = (tokenizer.convert_ids_to_tokens(part) for part in (ids, rows[0][: len(ids)]))
    raise GuidekitError(
        f"the columns of phrases are wrong: {who} reads {' '.join(got)}, where the prompt is "
        f"{' '.join(wanted)}; give the columns by hand (Segment(tokens=...))"
    )


def _begins(row: list[int], ids: list[int]) -> bool:
    whole = len(ids) if len(ids) <= len(row) else len(row) - 1
    return row[:whole] == ids[:whole]
