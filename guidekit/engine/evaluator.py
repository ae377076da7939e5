"""Calls of the branches in, evaluations out: as few denoiser calls as their edits allow."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from guidekit.backbones.denoiser import Denoiser
from guidekit.backbones.storage import casts, wide_weights
from guidekit.engine.capture import Call, Capture, Part, StopForward
from guidekit.engine.fork import fork
from guidekit.engine.precision import Rescaled
from guidekit.errors import GuidekitError
from guidekit.reads import Eval
from guidekit.taps import RUNNING, Showing, called

#: Rows in one denoiser call; null and cond of all images, the bare pipeline's call, always fit.
ROWS = 16
#: How the branches ride where some need a graph and others do not: all in one call, whose graph
#: covers all rows, or those with a graph apart.
BATCHED, SPLIT = "batched", "split"
EVERY = "*"  # the kind that stands for all that are not named, so that nothing is measured

# What was measured in this process, so that its runs on one architecture are all alike.
_MEASURED: dict[tuple, str] = {}
_MEASURING = threading.Lock()


class Evaluator:
    """Calls a denoiser for branches; it knows neither guidances nor schedulers.

    memory: "low" computes blocks again in backward and keeps branches without a graph out of
    batches with one. chosen: how mixed branches ride, by the kind of call; what is missing is
    measured at the first such call and put there, so that a replay can be given it. blocks: those
    at whose entry rows can join a call.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        channels: int,
        implementation: str,
        memory: str = "fast",
        chosen: dict[str, str] | None = None,
        blocks: Sequence[str] = (),
    ):
        self.denoiser, self.channels = denoiser, channels
        self.implementation, self.memory = implementation, memory
        self.chosen = {} if chosen is None else chosen
        self.blocks = blocks
        #: Denoiser calls so far, for tests and benchmarks.
        self.count = 0

    # Of the whole model, so looked for once a run and not at each of its steps.

    @cached_property
    def _dtype(self) -> torch.dtype:
        """What the denoiser computes in."""
        return self.denoiser.dtype

    @cached_property
    def _casts(self) -> bool:
        """Whether layers widen their weights for each forward."""
        return casts(self.denoiser.model)

    @cached_property
    def _checkpointing(self) -> list[torch.nn.Module]:
        """The blocks that a user can have computed again in backward."""
        blocks = self.denoiser.model.modules()
        return [block for block in blocks if hasattr(block, "gradient_checkpointing")]

    def evaluate(self, calls: Sequence[Call]) -> list[Eval]:
        """One evaluation per call, in their order.

        Raises GuidekitError where a site that a call reads or edits did not run.
        """
        return self._run(calls, self._mode(calls) == BATCHED)

    def _run(self, calls: Sequence[Call], batched: bool) -> list[Eval]:
        """The evaluations, with branches that need a graph and others together or apart."""
        found: dict[int, Eval] = {}
        for group in self._groups(calls, batched):
            outs = self._call([calls[i] for i in group])
            found |= dict(zip(group, outs, strict=True))
        return [found[i] for i in range(len(calls))]

    def _groups(self, calls: Sequence[Call], batched: bool) -> list[list[int]]:
        """Numbers of the calls that share a denoiser call."""
        groups: dict[tuple, list[int]] = {}
        longest = [max(call.lengths, default=0) for call in calls]
        # Where text and pixels are packed, texts of other lengths would move a tapped call's.
        packed = self.denoiser.family.order != "cross" and len(set(longest)) > 1
        for i, call in enumerate(calls):
            graph = call.graph and not batched
            apart = (packed and call.tapped) or call.branch.text is not None
            own = longest[i] if apart else None
            key = (tuple(call.x.shape[1:]), graph, call.stop, own)
            groups.setdefault(key, []).append(i)
        limit = 1 if not calls else max(2, ROWS // len(calls[0].x))
        return [g[i : i + limit] for g in groups.values() for i in range(0, len(g), limit)]

    def _mode(self, calls: Sequence[Call]) -> str:
        """Batched or split, as given, as measured before, or measured now."""
        graph = [call.graph for call in calls]
        if self.memory == "low" or not any(graph):
            return SPLIT
        if self._groups(calls, True) == self._groups(calls, False):
            return BATCHED
        kind = "+".join(f"{c.branch.name}*" if c.graph else c.branch.name for c in calls)
        if kind not in self.chosen and EVERY in self.chosen:
            return self.chosen[EVERY]
        if kind not in self.chosen:
            key = (kind, *self._architecture(calls))
            with _MEASURING:
                if key not in _MEASURED:
                    _MEASURED[key] = self._measured(calls)
            self.chosen[kind] = _MEASURED[key]
        return self.chosen[kind]

    def _architecture(self, calls: Sequence[Call]) -> tuple:
        """What the times depend on."""
        model, x = self.denoiser.model, calls[0].x
        shapes = tuple(tuple(call.x.shape) for call in calls)
        taps = sum(len(sites) for call in calls for sites in call.wanted.values())
        threads = torch.get_num_threads()
        return (repr(dict(model.config)), str(x.device), str(x.dtype), shapes, taps, threads)

    def _measured(self, calls: Sequence[Call]) -> str:
        """The faster way, forward and backward, after one call to warm up."""
        first = self._seconds(calls, False)
        if first is None:
            return SPLIT
        seconds = {mode: self._seconds(calls, mode == BATCHED) for mode in (BATCHED, SPLIT)}
        return SPLIT if None in seconds.values() else min(seconds, key=seconds.get)

    def _seconds(self, calls: Sequence[Call], batched: bool) -> float | None:
        """Time of the calls and of a backward of all that they gave; None if memory is scarce."""
        own = [_trial(call) for call in calls]
        device = own[0].x.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        started = time.perf_counter()
        evals = self._run(own, batched)
        if free is not None and torch.cuda.mem_get_info(device)[0] < free / 3:
            return None
        total = sum(x.float().sum() for e in evals for x in e.tensors().values() if x.requires_grad)
        torch.autograd.grad(total, [call.x for call in own if call.graph], allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    def _call(self, calls: list[Call]) -> list[Eval]:
        """One denoiser call of several branches."""
        graph = any(call.graph for call in calls)
        first = calls[0]
        scaling = self._scaling(graph, first.x)
        # Autograd would be asked for the graph of branches that no energy reads.
        cut = graph and all(call.cut for call in calls if call.graph)
        parts = [Part(call, self.denoiser) for call in calls]
        plan = fork(parts, self.blocks) if self._forks(calls) else None
        early = calls if plan is None else plan.early
        x = torch.cat([self._ready(call, scaling) for call in early])
        text = type(first.text).cat([call.text for call in early])
        capture = Capture(parts, self.implementation, cut, first.stop, fork=plan)
        out = None
        stops, opened = contextlib.suppress(StopForward), self._opened(calls, capture, graph)
        with torch.set_grad_enabled(graph), stops, opened:
            out = self.denoiser(x, first.timestep, text)
        self.count += 1
        self._check_seen(parts)
        outs = [None] * len(calls) if out is None else out.split([part.size for part in parts])
        evals = [self._eval(part, own) for part, own in zip(parts, outs, strict=True)]
        return scaling.leave(evals) if scaling else evals

    def _forks(self, calls: list[Call]) -> bool:
        """Whether rows may join the call late: nothing but its blocks must mix what they made."""
        denoiser = self.denoiser
        compiled = denoiser.network is not denoiser.model or called(denoiser.model) != "forward"
        cached = getattr(denoiser.model, "is_cache_enabled", False)
        graph = any(call.graph or call.stop for call in calls)
        return not (graph or compiled or cached or denoiser.controlled)

    def _scaling(self, graph: bool, x: Tensor) -> Rescaled | None:
        """The loss scale of a call whose gradients would underflow: one in half precision."""
        if not graph:
            return None
        device = x.device.type
        half = self._dtype == torch.float16
        if torch.is_autocast_enabled(device):
            half = torch.get_autocast_dtype(device) == torch.float16
        return Rescaled() if half else None

    def _ready(self, call: Call, scaling: Rescaled | None) -> Tensor:
        """The model's input of a branch, in the denoiser's type."""
        x = call.x if scaling is None else scaling.enter(call.x)
        return call.ready(x.to(self._dtype))

    def _eval(self, part: Part, out: Tensor | None) -> Eval:
        """The evaluation of a branch from the model's output (B, C or 2C, h, w)."""
        reads = {(id(part.call.reads[n]), site): x for (n, site), x in part.found.items()}
        variance = None
        if out is not None and out.shape[1] > self.channels:
            out, variance = out[:, : self.channels], out[:, self.channels :]
        return Eval(part.call.branch, out, reads, variance, part.implementations)

    def _check_seen(self, parts: list[Part]) -> None:
        """Raises GuidekitError for sites that a branch wants and that did not run."""
        for part in parts:
            wanted = frozenset().union(*part.call.wanted.values())
            if part.call.stop:
                wanted = frozenset().union(*(read.sites for read in part.call.reads))
            if missing := sorted(wanted - part.seen):
                raise GuidekitError(
                    f"{', '.join(missing)} did not run in the branch {part.call.branch.name!r}, so "
                    "it can be neither read nor changed; caches skip blocks (first-block cache, "
                    "pyramid attention broadcast): call disable_cache() on the denoiser"
                )

    @contextlib.contextmanager
    def _opened(self, calls: list[Call], capture: Capture, graph: bool) -> Iterator[None]:
        """The capture behind the taps, what autograd keeps, a cache's context, checkpoints."""
        model = self.denoiser.model
        with contextlib.ExitStack() as stack:
            stack.enter_context(Showing(capture))
            own = graph and any(block.gradient_checkpointing for block in self._checkpointing)
            checkpoints = graph and (self.memory == "low" or own)
            if graph and self._casts:
                stack.enter_context(wide_weights(model, checkpoints))
            if getattr(model, "is_cache_enabled", False):
                name = "+".join(call.branch.name for call in calls)
                stack.enter_context(model.cache_context(name))
            # A user's own checkpoints would run blocks again without the capture.
            if checkpoints:
                stack.enter_context(checkpointed(model))
            yield


def _trial(call: Call) -> Call:
    """The call for a measurement: on an input of its own, its hooks' changes not counted."""
    edits = [edit.again() for edit in call.edits]
    own = {name: getattr(call, name) for name in ("branch", "timestep", "text", "ready", "reads")}
    x = call.x.detach().requires_grad_(call.graph)
    return Call(
        **own,
        x=x,
        edits=edits,
        lengths=call.lengths,
        graph=call.graph,
        cut=call.cut,
        stop=call.stop,
    )


@contextlib.contextmanager
def checkpointed(model: torch.nn.Module) -> Iterator[None]:
    """Gradient checkpointing whose second run of a block goes to the same capture as the first."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    modules = [m for m in model.modules() if hasattr(m, names[0])]
    before = [{name: vars(m)[name] for name in names if name in vars(m)} for m in modules]
    model.enable_gradient_checkpointing(_run_block)
    try:
        yield
    finally:
        for module, values in zip(modules, before, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(values)


def _run_block(module: Callable, *args):
    """A block under a checkpoint; its second run is shown to what the first was shown to."""
    again: AbstractContextManager = Showing(RUNNING.get())
    contexts = lambda: (contextlib.nullcontext(), again)  # noqa: E731
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)(module.__call__, *args)
