"""Taps: read and change the attention and the features of a model while it runs.

A tap wraps the `forward` of chosen modules. Attention is seen by a `TorchFunctionMode` on
`F.scaled_dot_product_attention` that is entered inside each wrapped forward, so it is also
active when gradient checkpointing runs the module a second time; one mode round the whole
model would not be. Processors, projections and the process-wide attention backend stay as they
are, so that LoRA, fused projections, IP-Adapter, qk-norm and rotary embeddings are all in what is
seen. Hooks are not used: they go silent under torch.compile, a wrapped forward does not.
"""

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guidekit.attention.call import AttentionCall
from guidekit.attention.choice import choose
from guidekit.errors import GuidekitError

SDPA = F.scaled_dot_product_attention
_SDPA_NAMES = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)


class Patch:
    """A wrapper round one method of an object, removable in any order among other wrappers.

    around(original, args, kwargs) stands in for the method, a module's forward unless named
    otherwise. The instance attribute that was there before (a diffusers HookRegistry or accelerate
    hook) is kept and put back. A patch that lies under a later wrapper becomes a pass-through, and
    goes when that one does, if it is a patch too.
    """

    def __init__(
        self,
        owner: object,
        around: Callable[[Callable, tuple, dict], Any],
        name: str = "forward",
    ):
        self.owner, self.name, self.active = owner, name, True
        self.previous = vars(owner).get(name)
        original = getattr(owner, name)

        # diffusers and accelerate inspect the signatures of forward and of scheduler.step.
        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            if self.active:
                return around(original, args, kwargs)
            return original(*args, **kwargs)

        self.wrapper = wrapper
        wrapper.patch = self
        setattr(owner, name, wrapper)

    def remove(self) -> None:
        """Restore the method that the object had, or pass through if wrapped again since."""
        self.active = False
        if vars(self.owner).get(self.name) is not self.wrapper:
            return
        previous = self.previous
        # `functools.wraps` copies the attribute to wrappers of others.
        while (patch := getattr(previous, "patch", None)) and patch.wrapper is previous:
            if patch.active:
                break
            previous = patch.previous
        if previous is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, previous)


@contextlib.contextmanager
def _patched(model: nn.Module, sites: Sequence[str], around: Callable) -> Iterator[None]:
    """Wrap every site with around(site, module, original, args, kwargs) inside the context."""
    patches = []
    try:
        for site in sites:
            module = model.get_submodule(site)
            patches.append(Patch(module, functools.partial(around, site, module)))
        yield
    finally:
        for patch in reversed(patches):
            patch.remove()


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "processor") and callable(getattr(module, "set_processor", None))


def _candidates(model: nn.Module, kind: str) -> list[str]:
    """Names of the attention modules, or of the blocks: members of module lists and mid_block."""
    if kind == "attention":
        return [name for name, module in model.named_modules() if _is_attention(module)]
    if kind != "block":
        raise GuidekitError(f"kind is 'attention' or 'block', not {kind!r}")
    names = []
    for name, _ in model.named_modules():
        parent, _, last = name.rpartition(".")
        # to_out and net are lists inside an attention and a feed-forward module.
        listed = last.isdigit() and parent.rpartition(".")[2] not in ("to_out", "net")
        listed = listed and isinstance(model.get_submodule(parent), nn.ModuleList)
        if last == "mid_block" or listed:
            names.append(name)
    return names


def find_sites(
    model: nn.Module, patterns: str | Sequence[str], kind: str = "attention"
) -> list[str]:
    """Dotted names of the modules that the wildcards match, in the model's own order.

    Patterns are fnmatch's (`*` crosses dots). Raises GuidekitError, naming what exists, if any one
    of the patterns matches nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = _candidates(model, kind)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            there = ", ".join(names) or "none"
            raise GuidekitError(f"{pattern!r} matches no {kind} site of the model; it has: {there}")
    return [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]


class _Boundary(TorchFunctionMode):
    """Hands every SDPA call of one module's forward to `edit`."""

    def __init__(self, site: str, module: nn.Module, edit: Callable, implementation: str):
        super().__init__()
        self.site, self.module, self.edit = site, module, edit
        self.implementation, self.count = implementation, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not SDPA:
            return func(*args, **kwargs)
        given = dict(zip(_SDPA_NAMES, args, strict=False)) | kwargs
        given["mask"] = given.pop("attn_mask", None)
        index, self.count = self.count, self.count + 1
        call = AttentionCall(
            self.site, self.module, index, **given, implementation=self.implementation
        )
        out = self.edit(call)
        return call.run() if out is None else out


@contextlib.contextmanager
def tap_attention(
    model: nn.Module,
    edit: Callable[[AttentionCall], Tensor | None],
    sites: str | Sequence[str] = "*",
    implementation: str | None = None,
) -> Iterator[list[str]]:
    """Show each attention call of the chosen modules to `edit` while the context is open.

    `edit` may change the call and return None, then the call runs, or return the output
    (B, H, N, d) itself. Yields the names that `sites` (see `find_sites`) matched.
    A guided call must stay inside the context until its backward is done: gradient
    checkpointing runs the modules, and so `edit`, again then. In that second run `edit` must
    compute the same as in the first; it may drop the result.
    Raises GuidekitError for sites that match nothing, and RuntimeError when a chosen module runs
    without any SDPA call.
    """
    names = find_sites(model, sites)
    with open_attention(model, edit, names, choose(implementation)):
        yield names


def open_attention(
    model: nn.Module, edit: Callable, names: Sequence[str], implementation: str
) -> contextlib.AbstractContextManager[None]:
    """`tap_attention` for names that `find_sites` gave before: nothing is searched or checked."""

    def around(site, module, original, args, kwargs):
        boundary = _Boundary(site, module, edit, implementation)
        with _native_backend(module.processor), boundary:
            out = original(*args, **kwargs)
        if boundary.count == 0:
            raise RuntimeError(_no_call(site, module))
        return out

    return _patched(model, names, around)


def _no_call(site: str, module: nn.Module) -> str:
    processor = type(module.processor).__name__
    return (
        f"{site}: {processor} made no scaled_dot_product_attention call, so its attention can "
        "be neither read nor changed. Eager, sliced, xformers and linear-attention processors "
        "make none: call disable_attention_slicing() or "
        "disable_xformers_memory_efficient_attention() on the pipeline, or set_processor("
        "AttnProcessor2_0()) on the module, or leave the module out of the sites"
    )


@contextlib.contextmanager
def _native_backend(processor: Any) -> Iterator[None]:
    """Let a processor of `dispatch_attention_fn` reach SDPA for the length of one call.

    The native backends end in SDPA and stay; flash, sage, xformers and flex do not. Only this
    processor's own attribute is set: `set_attention_backend` would change the process's default.
    """
    # Absent on processors that call SDPA directly (UNets, DiT, PixArt, SD3).
    if not hasattr(processor, "_attention_backend"):
        yield
        return
    before = processor._attention_backend
    if _active_backend(before).strip("_").startswith("native"):
        yield
        return
    processor._attention_backend = AttentionBackendName.NATIVE
    try:
        yield
    finally:
        processor._attention_backend = before


def _active_backend(own: Any) -> str:
    """Name of the backend a processor will use: its own, else the process's default."""
    if own is None:
        own = _AttentionBackendRegistry._active_backend
    return AttentionBackendName(own).value


@dataclass(eq=False)
class BlockCall:
    """One call of a block: its arguments, and its output once `run` was called."""

    site: str
    module: nn.Module
    args: tuple
    kwargs: dict
    _original: Callable = field(repr=False)
    output: Any = None

    def run(self) -> Any:
        """The block's output for the (possibly changed) `args` and `kwargs`, kept in `output`.

        Where another editor has made an output already, it is that one.
        """
        if self.output is None:
            self.output = self._original(*self.args, **self.kwargs)
        return self.output

    def skip(self) -> Any:
        """The output of a block that does nothing: its hidden states, in its output's format.

        Only for blocks whose input and output have one shape; raises GuidekitError for others.
        """
        self.output = _skipped(self)
        return self.output


@contextlib.contextmanager
def tap_blocks(
    model: nn.Module,
    edit: Callable[[BlockCall], Any | None],
    sites: str | Sequence[str],
) -> Iterator[list[str]]:
    """Show each call of the chosen blocks to `edit` while the context is open.

    `edit` returns the block's output, in the block's own format, or None: then the output is
    `call.output`, run if `edit` did not. `block_features` reads an output. Yields the names that
    `sites` matched. As for `tap_attention`, the context stays open until backward is done.
    """
    names = find_sites(model, sites, kind="block")
    with open_blocks(model, edit, names):
        yield names


def open_blocks(
    model: nn.Module, edit: Callable, names: Sequence[str]
) -> contextlib.AbstractContextManager[None]:
    """`tap_blocks` for names that `find_sites` gave before: nothing is searched or checked."""

    def around(site, module, original, args, kwargs):
        call = BlockCall(site, module, args, kwargs, original)
        out = edit(call)
        if out is None:
            out = call.run() if call.output is None else call.output
        return out

    return _patched(model, names, around)


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


def _skipped(call: BlockCall) -> Any:
    """Input hidden states in the format that diffusers' own table gives for the block.

    Blocks that the table lacks (Sana's, attentions, resnets) are run, to see that they keep shape.
    """
    from diffusers.hooks._helpers import TransformerBlockRegistry
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    args, kwargs = call.args, call.kwargs
    hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("input_tensor"))
    if isinstance(call.module, Transformer2DModel):
        return (hidden,)
    try:
        meta = TransformerBlockRegistry.get(type(call.module))
    except ValueError:
        out = call.run()
        if isinstance(out, Tensor) and out.shape == hidden.shape:
            return hidden
        raise GuidekitError(
            f"a {type(call.module).__name__} cannot be skipped; a transformer block, or one whose "
            "output has the shape of its input, can"
        ) from None
    hidden = meta._get_parameter_from_args_kwargs(meta.hidden_states_argument_name, args, kwargs)
    if meta.return_encoder_hidden_states_index is None:
        return hidden
    text = meta._get_parameter_from_args_kwargs(
        meta.encoder_hidden_states_argument_name, args, kwargs
    )
    return (text, hidden) if meta.return_hidden_states_index == 1 else (hidden, text)
