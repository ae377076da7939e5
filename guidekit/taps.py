"""Taps: read and change the attention and the features of a model while it runs.

A tap wraps the `forward` of chosen modules. Attention is seen by a `TorchFunctionMode` on
`F.scaled_dot_product_attention` that is entered inside each wrapped forward, so it is also
active when gradient checkpointing runs the module a second time; one mode round the whole
model would not be. Processors, projections and the process-wide attention backend stay as they
are, so that LoRA, fused projections, IP-Adapter, qk-norm and rotary embeddings are all in what is
seen. Hooks are not used: they go silent under torch.compile, a wrapped forward does not.

The wrappers of runs (`installed`) stay while a run lasts and ask a ContextVar whose call it is;
`tap_attention` and `tap_blocks` show every call of the model, for tools outside of a run.
"""

import contextlib
import fnmatch
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guidekit.attention.call import AttentionCall
from guidekit.attention.choice import choose
from guidekit.blocks import BlockCall, learn
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


def called(network: nn.Module) -> str:
    """The method of a network that a call of it runs first, also where it is compiled.

    `module.compile()` compiles the whole call, so that a wrapper of `forward` would be compiled
    with it; what `torch.compile(module)` returns has a `forward` of its own.
    """
    compiled = getattr(network, "_compiled_call_impl", None) is not None
    return "_compiled_call_impl" if compiled else "forward"


class Shown(Protocol):
    """What a denoiser call shows its tapped calls to."""

    #: The implementation of attention that runs the calls.
    implementation: str

    def wants(self, kind: str, site: str) -> bool:
        """Whether calls of a kind, "attention" or "block", at a site are shown to it.

        Of the kind "join": whether rows join the call at the entry of a block.
        """

    def attention(self, call: "AttentionCall") -> Tensor | None:
        """The output of an attention call, None to run it."""

    def block(self, call: "BlockCall") -> Any | None:
        """The output of a block, None to run it."""

    def joined(self, given: tuple | dict) -> tuple | dict:
        """The arguments of a block with the rows that join the call at it."""


#: What the denoiser call that runs in this thread shows its tapped calls to. A wrapper that finds
#: nothing here, or a call that does not want its site, runs the module as if it were not there.
RUNNING: ContextVar[Shown | None] = ContextVar("guidekit_running", default=None)


class Showing:
    """Calls at tapped sites are shown to `shown`, in this thread and inside the context.

    It can be entered again and again: each backward through a checkpoint enters it, in autograd's
    own thread.
    """

    def __init__(self, shown: Shown | None):
        self.shown = shown
        self._tokens: list = []

    def __enter__(self) -> None:
        self._tokens.append(RUNNING.set(self.shown))

    def __exit__(self, *_) -> None:
        RUNNING.reset(self._tokens.pop())


_INSTALLED: "WeakKeyDictionary[nn.Module, dict]" = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextlib.contextmanager
def installed(model: nn.Module, sites: dict[str, Iterable[str]]) -> Iterator[None]:
    """Wrappers at the sites of each kind, "attention" and "block", for the length of the context.

    They are shared by all runs on the model, in all threads, and go with the last. They ask
    `RUNNING` whose call it is, so a tapped call belongs to the run and the thread that opened it,
    and the guards of torch.compile hold from step to step and from run to run.
    """
    keys = [(kind, site) for kind in ("attention", "block") for site in sites.get(kind, ())]
    with _LOCK:
        there = _INSTALLED.setdefault(model, {})
        for kind, site in keys:
            if (kind, site) not in there:
                module = model.get_submodule(site)
                if kind == "block":
                    learn(module)
                around = functools.partial(_AROUND[kind], site, module)
                there[kind, site] = [Patch(module, around), 0]
            there[kind, site][1] += 1
    try:
        yield
    finally:
        with _LOCK:
            for key in reversed(keys):
                there[key][1] -= 1
                if not there[key][1]:
                    there.pop(key)[0].remove()


def _around_attention(site, module, original, args, kwargs):
    """An attention module's forward, its calls shown to the denoiser call that is running."""
    shown = RUNNING.get()
    if shown is None or not shown.wants("attention", site):
        return original(*args, **kwargs)
    return _bounded(site, module, original, args, kwargs, shown.attention, shown.implementation)


def _bounded(site, module, original, args, kwargs, edit, implementation):
    """An attention module's forward with its SDPA calls handed to `edit`."""
    boundary = _Boundary(site, module, edit, implementation)
    with _native_backend(module.processor), boundary:
        out = original(*args, **kwargs)
    if boundary.count == 0:
        raise RuntimeError(_no_call(site, module))
    return out


def _around_block(site, module, original, args, kwargs):
    """A block's forward, shown to the denoiser call that is running; rows may join that there."""
    shown = RUNNING.get()
    if shown is None:
        return original(*args, **kwargs)
    if shown.wants("join", site):
        args, kwargs = shown.joined(args), shown.joined(kwargs)
    if not shown.wants("block", site):
        return original(*args, **kwargs)
    return _blocked(site, module, original, args, kwargs, shown.block)


def _blocked(site, module, original, args, kwargs, edit):
    """A block's forward handed to `edit`; run afterwards if it did not."""
    call = BlockCall(site, module, args, kwargs, original)
    out = edit(call)
    if out is None:
        out = call.run() if call.output is None else call.output
    return out


_AROUND = {"attention": _around_attention, "block": _around_block}


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
    implementation = choose(implementation)

    def around(site, module, original, args, kwargs):
        return _bounded(site, module, original, args, kwargs, edit, implementation)

    with _patched(model, names, around):
        yield names


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
    for name in names:
        learn(model.get_submodule(name))

    def around(site, module, original, args, kwargs):
        return _blocked(site, module, original, args, kwargs, edit)

    with _patched(model, names, around):
        yield names
