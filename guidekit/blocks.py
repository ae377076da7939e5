"""One call of a block of a denoiser: its arguments, its output, its rows and its features."""

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from guidekit.errors import GuidekitError

#: Arguments without a row per image, though their first side may be as long as the batch.
WHOLE = ("img_ids", "txt_ids", "ip_adapter_masks", "skip_layers")


@dataclass(eq=False)
class BlockCall:
    """One call of a block: its arguments, and its output once `run` was called."""

    site: str
    module: nn.Module
    args: tuple
    kwargs: dict
    _original: Callable = field(repr=False)
    output: Any = None
    made: Any = field(default=None, repr=False)  # what `run` gave

    def state(self) -> tuple:
        """What an edit can change beside the output, to be compared by identity."""
        return (*self.args, *self.kwargs.values())

    def copied(self) -> "BlockCall":
        """The call as it is now, to be run by itself."""
        return replace(self)

    def run(self) -> Any:
        """The block's output for the (possibly changed) `args` and `kwargs`, kept in `output`.

        Where another editor has made an output already, it is that one.
        """
        if self.output is None:
            self.output = self._original(*self.args, **self.kwargs)
        self.made = self.output
        return self.output

    def skip(self) -> Any:
        """The output of a block that does nothing: its hidden states, in its output's format.

        Only for blocks whose input and output have one shape; raises GuidekitError for others.
        """
        self.output = _skipped(self)
        return self.output


class BlockRows:
    """A call of a block as calls of its rows, `sizes` after one another along the batch.

    The block runs once for all rows; a part whose arguments were changed runs by itself, and one
    that is skipped does not run at all where no other needs the whole. within: what to enter while
    a part runs by itself.
    """

    def __init__(
        self, whole: BlockCall, sizes: Sequence[int], within: Sequence[AbstractContextManager]
    ):
        self.whole, self.sizes, self.within = whole, list(sizes), within
        args = _split_rows(whole.args, self.sizes)
        kwargs = _split_rows(whole.kwargs, self.sizes)
        self._given = [(*a, *k.values()) for a, k in zip(args, kwargs, strict=True)]
        self._outputs: list[Any] | None = None
        self.parts = [
            BlockCall(whole.site, whole.module, a, k, functools.partial(self._run, i))
            for i, (a, k) in enumerate(zip(args, kwargs, strict=True))
        ]

    def _run(self, index: int, *args, **kwargs) -> Any:
        """The output of one part for the arguments that it has now."""
        now, given = (*args, *kwargs.values()), self._given[index]
        if len(now) != len(given) or any(a is not b for a, b in zip(now, given, strict=True)):
            with self.within[index]:
                return self.whole._original(*args, **kwargs)
        return self._shared()[index]

    def _shared(self) -> list[Any]:
        """The parts' rows of the block's own output."""
        if self._outputs is None:
            self._outputs = _split_rows(self.whole.run(), self.sizes)
        return self._outputs

    def joined(self) -> Any:
        """The output of all rows, in the block's own format."""
        if all(part.output is None for part in self.parts):
            return self.whole.run()
        self._run_rest()
        outputs = [part.run() for part in self.parts]
        if self._outputs is not None and all(
            own is shared for own, shared in zip(outputs, self._outputs, strict=True)
        ):
            return self.whole.output
        return _joined_rows(outputs)

    def _run_rest(self) -> None:
        """Runs the parts that nobody has run, on their own rows if the whole did not run."""
        if torch.compiler.is_compiling():  # entering a context would end the graph
            self._shared()
        for part, within in zip(self.parts, self.within, strict=True):
            if part.output is None and self._outputs is None:
                with within:
                    part.output = self.whole._original(*part.args, **part.kwargs)


def _has_rows(value: Tensor, count: int, name: str) -> bool:
    """Whether an argument or output has a row for each of `count` images.

    Rotary embeddings of two dimensions have a row per token.
    """
    whole = name in WHOLE or (name == "image_rotary_emb" and value.ndim == 2)
    return value.ndim > 0 and len(value) == count and not whole


def repeated_rows(value: Any, count: int, taken: Callable[[Tensor], Tensor], name: str = "") -> Any:
    """A block's arguments with what `taken` makes of tensors that have a row per image."""
    if isinstance(value, Tensor):
        return taken(value) if _has_rows(value, count, name) else value
    if isinstance(value, dict):
        return {key: repeated_rows(item, count, taken, key) for key, item in value.items()}
    if type(value) in (tuple, list):  # not sizes and other kinds of tuples
        return type(value)(repeated_rows(item, count, taken, name) for item in value)
    return value


def _split_rows(value: Any, sizes: list[int], name: str = "") -> list[Any]:
    """A block's arguments or output, part by part: tensors with a row per image are cut."""
    if isinstance(value, Tensor):
        cut = _has_rows(value, sum(sizes), name)
        return list(value.split(sizes)) if cut else [value] * len(sizes)
    if isinstance(value, dict):
        split = {key: _split_rows(item, sizes, key) for key, item in value.items()}
        return [{key: items[i] for key, items in split.items()} for i in range(len(sizes))]
    if isinstance(value, tuple | list):
        items = [_split_rows(item, sizes, name) for item in value]
        return [type(value)([item[i] for item in items]) for i in range(len(sizes))]
    return [value] * len(sizes)


def _joined_rows(parts: list[Any]) -> Any:
    """Outputs of the parts after one another along the batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, tuple | list):
        return type(first)([_joined_rows(list(items)) for items in zip(*parts, strict=True)])
    return first


def block_features(
    output: Any, grid: tuple[int, int] | None = None, rows: slice = slice(None)
) -> Tensor:
    """Features (B, C, h, w) out of the output of a block.

    UNet blocks return (B, C, h, w), alone or first in a tuple; transformer blocks return tokens
    (B, N, C), alone or last in a tuple. Tokens need `grid` (h, w), and `rows` to drop the text
    of a packed sequence; ValueError without.
    """
    tensor = output if isinstance(output, Tensor) else output[_features_index(output)]
    if tensor.ndim == 4:
        return tensor
    if grid is None:
        raise GuidekitError(f"tokens {tuple(tensor.shape)} need grid=(h, w) to become features")
    tokens = tensor[:, rows]
    return tokens.transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, h, w)


def _features_index(output: Sequence) -> int:
    return 0 if isinstance(output[0], Tensor) and output[0].ndim == 4 else -1


@dataclass(frozen=True)
class _Format:
    """Arguments of a block's forward, in order, and where its hidden states and text go."""

    arguments: tuple[str, ...]
    hidden: str
    text: str | None  # None where the block returns no text
    hidden_first: bool

    def of(self, call: BlockCall, name: str) -> Any:
        """An argument of a call."""
        if name in call.kwargs:
            return call.kwargs[name]
        return call.args[self.arguments.index(name)]


_FORMATS: dict[type, _Format | None] = {}


def learn(module: nn.Module) -> None:
    """Looks up how a kind of block is skipped, before a compiled call would have to."""
    kind = type(module)
    if kind in _FORMATS:
        return
    try:
        meta = TransformerBlockRegistry.get(kind)
    except ValueError:  # Sana's, attentions, resnets
        _FORMATS[kind] = None
        return
    returns_text = meta.return_encoder_hidden_states_index is not None
    _FORMATS[kind] = _Format(
        tuple(inspect.signature(kind.forward).parameters)[1:],
        meta.hidden_states_argument_name,
        meta.encoder_hidden_states_argument_name if returns_text else None,
        meta.return_hidden_states_index != 1,
    )


def _skipped(call: BlockCall) -> Any:
    """Input hidden states in the format that diffusers' own table gives for the block.

    Blocks that the table lacks are run, to see that they keep shape.
    """
    args, kwargs = call.args, call.kwargs
    hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("input_tensor"))
    if isinstance(call.module, Transformer2DModel):
        return (hidden,)
    form = _FORMATS[type(call.module)]
    if form is None:
        out = call.run()
        if isinstance(out, Tensor) and out.shape == hidden.shape:
            return hidden
        raise GuidekitError(
            f"a {type(call.module).__name__} cannot be skipped; a transformer block, or one whose "
            "output has the shape of its input, can"
        )
    hidden = form.of(call, form.hidden)
    if form.text is None:
        return hidden
    text = form.of(call, form.text)
    return (hidden, text) if form.hidden_first else (text, hidden)
