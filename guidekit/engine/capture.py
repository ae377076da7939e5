"""Reads and edits of one denoiser call: each branch is shown its own rows at the tapped sites."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor

from guidekit.attention.call import AttentionCall, attend
from guidekit.backbones.denoiser import Denoiser, Text
from guidekit.backbones.padding import aligned, reorder, taken
from guidekit.backbones.records import in_pixels, site_features, site_grid
from guidekit.blocks import BlockCall, BlockRows
from guidekit.branches import Branch
from guidekit.engine.rows import rows
from guidekit.engine.variants import placed, variant
from guidekit.errors import GuidekitError
from guidekit.reads import AttentionRead, FeatureRead
from guidekit.taps import Showing


class StopForward(Exception):
    """Ends a denoiser call after its last site."""


class Edit:
    """A hook that changes calls at some sites; it keeps at which of them it did.

    images: (B,) bool, whose rows it changes, None for all. `plain` is then the last call as it was
    without it, or None if it changed nothing.
    """

    def __init__(
        self,
        name: str,
        hook: Callable,
        kind: str,
        sites: frozenset[str],
        images: Tensor | None = None,
    ):
        self.name, self.hook, self.kind, self.sites = name, hook, kind, sites
        self.images = images
        self.changed: set[str] = set()
        self.plain: AttentionCall | BlockCall | None = None

    def again(self) -> "Edit":
        """The same hook with nothing kept."""
        return Edit(self.name, self.hook, self.kind, self.sites, self.images)

    def __call__(self, call: AttentionCall | BlockCall) -> object | None:
        """The hook's answer: an output, or None if it changed the call itself, or nothing."""
        before = call.state()
        self.plain = None if self.images is None else call.copied()
        answer = self.hook(call)
        if (answer is not None and answer is not call.made) or differ(before, call.state()):
            self.changed.add(call.site)
        elif self.kind == "attention":  # a block may have been skipped
            self.plain = None
        if self.plain is None:
            return answer
        return rows(self.images, call.run() if answer is None else answer, self.plain.run())


def differ(before: Sequence, after: Sequence) -> bool:
    """Whether any of the things has become another object."""
    return len(before) != len(after) or any(
        one is not other for one, other in zip(before, after, strict=True)
    )


@dataclass(eq=False)
class Call:
    """What one branch asks of the denoiser.

    x: carried input (B, C, h, w); `ready` makes of it the model's scaled input. twin: name of the
    branch whose call this one is until its first edited site, None for no other's. reads: what to
    keep on the way. edits: hooks at tapped sites, in order. lengths: text tokens of each image.
    graph: the output, or the reads, need a gradient to x. cut: no graph is needed after the last
    read. stop: the call may end there; its output is then None.
    """

    branch: Branch
    x: Tensor
    timestep: Tensor | int
    text: Text
    ready: Callable[[Tensor], Tensor] = lambda x: x
    reads: Sequence[AttentionRead | FeatureRead] = ()
    edits: Sequence[Edit] = ()
    lengths: Sequence[int] = ()
    graph: bool = False
    cut: bool = False
    stop: bool = False
    twin: str | None = None
    wanted: dict[str, frozenset[str]] = field(init=False, repr=False)

    def __post_init__(self):
        kinds = {"attention": AttentionRead, "block": FeatureRead}
        self.wanted = {
            kind: frozenset().union(
                *(read.sites for read in self.reads if isinstance(read, cls)),
                *(edit.sites for edit in self.edits if edit.kind == kind),
            )
            for kind, cls in kinds.items()
        }

    @property
    def tapped(self) -> bool:
        """Whether it reads or edits anything."""
        return any(self.wanted.values())


class Part:
    """One branch's rows of a denoiser call; `found` maps (number of the read, site) to a tensor.

    size: its rows in the call, 0 until they join it (`guidekit.engine.fork`).
    """

    def __init__(self, call: Call, denoiser: Denoiser):
        self.call, self.denoiser, self.family = call, denoiser, denoiser.family
        self.size, self.grid = len(call.x), tuple(call.x.shape[-2:])
        self.found: dict[tuple[int, str], Tensor] = {}
        self.implementations: dict[str, str] = {}
        self.seen: set[str] = set()
        self.pending = {site for read in call.reads for site in read.sites}

    def attention(self, call: AttentionCall) -> Tensor | None:
        """Shows the call to the editors, then reads it; None leaves running it to the tap."""
        edits = [e for e in self.call.edits if e.kind == "attention" and call.site in e.sites]
        reads = self._reads(AttentionRead, call.site)
        self.seen.add(call.site)
        order = self._order(call.site, call.query.shape[2])
        if order is None:
            return self._shown(call, edits, reads)
        reorder(call, order)
        out = self._shown(call, edits, reads)
        return taken(call.run() if out is None else out, order.argsort(1))

    def _reads(self, cls: type, site: str) -> list[tuple[int, AttentionRead | FeatureRead]]:
        """The numbered reads of a kind at a site."""
        return [
            (n, read)
            for n, read in enumerate(self.call.reads)
            if isinstance(read, cls) and site in read.sites
        ]

    def _shown(self, call: AttentionCall, edits: list[Edit], reads: list) -> Tensor | None:
        """Edits and reads of a call in which every image's text has the same columns."""
        out, partly = None, None
        for edit in edits:
            if out is not None:
                raise GuidekitError(_made_before(edit, call.site, partly))
            out = edit(call)
            partly = edit if edit.plain is not None else partly
        if not reads or call.index > 0:  # further calls are an IP-Adapter's image tokens
            return out
        own = self._read(call, reads)
        if partly is not None:
            self._read_partly(call.site, partly, reads)
        self.implementations[call.site] = call.implementation
        self.pending.discard(call.site)
        return own if out is None else out

    def _read_partly(self, site: str, edit: Edit, reads: list) -> None:
        """Takes the maps of images that an edit left alone from the call as it was without it."""
        edited = {n: self.found.pop((n, site)) for n, _ in reads}
        self._read(edit.plain, reads)
        for n, maps in edited.items():
            self.found[n, site] = rows(edit.images, maps, self.found[n, site])

    def _order(self, site: str, count: int) -> Tensor | None:
        """Order (B, count) that gives all images the same columns; None if they have them."""
        if len(set(self.call.lengths)) <= 1:
            return None
        if not any(fnmatchcase(site, pattern) for pattern in self.family.cross_sites):
            return None
        return aligned(list(self.call.lengths), count)

    def block(self, call: BlockCall) -> object | None:
        """Shows the block to the editors, each after what the one before made, and reads it."""
        for edit in self.call.edits:
            if edit.kind == "block" and call.site in edit.sites:
                output = edit(call)
                call.output = call.output if output is None else output
        self.seen.add(call.site)
        reads = self._reads(FeatureRead, call.site)
        if not reads:
            return call.output
        output = call.run()
        features = self._features(output, call.site)
        for n, _ in reads:
            self.found.setdefault((n, call.site), features)
        self.pending.discard(call.site)
        return output

    def _features(self, output: object, site: str) -> Tensor:
        """Features (B, C, h, w) of the pixels out of a block's output."""
        model = self.denoiser.model
        if not in_pixels(model, output):
            tokens = output if isinstance(output, Tensor) else output[-1]
            h, w = site_grid(model, site, *self.grid)
            packed = tokens.shape[1] != h * w  # text and pixels in one sequence
            order = self._order(f"{site}.attn", tokens.shape[1]) if packed else None
            output = tokens if order is None else taken(tokens, order)
        return site_features(model, site, output, self.grid)

    def _read(self, call: AttentionCall, reads: list[tuple[int, AttentionRead]]) -> Tensor:
        """Runs the call and keeps its maps; plain reads share one pass."""
        rows = self.family.rows(call.query.shape[2], reads[0][1].weights.shape[1])
        plain = [(n, r) for n, r in reads if r.plain]
        out = self._read_plain(call, plain, rows) if plain else call.run()
        for n, read in reads:
            if (n, read) not in plain:
                self._keep(n, read, call.site, variant(call, read, self.family, rows))
        return out

    def _read_plain(
        self, call: AttentionCall, reads: list[tuple[int, AttentionRead]], rows: slice
    ) -> Tensor:
        """The call's output; its maps come out of the same pass."""
        weights = [placed(r.weights, self.family, call) for _, r in reads]
        joined = weights[0] if len(weights) == 1 else torch.cat(weights, -1)
        out, maps = attend(call, joined, rows=rows)
        parts = maps.split([w.shape[-1] for w in weights], 1)
        for (n, read), part in zip(reads, parts, strict=True):
            self._keep(n, read, call.site, part)
        return out

    def _keep(self, number: int, read: AttentionRead, site: str, maps: Tensor) -> None:
        """Maps (..., N) as images (..., h, w), the first time only."""
        self.found.setdefault((number, site), maps.unflatten(-1, read.shape(site)))


class Joining(Protocol):
    """Where rows of some parts join a denoiser call: see `guidekit.engine.fork`."""

    blocks: frozenset[str]

    def entered(self, given: Any) -> Any:
        """Arguments of a block with rows for all parts."""


class Capture:
    """One denoiser call of several branches: its rows, part by part, behind the taps.

    It is what the taps find while the call runs. At a tapped site the call is split into the rows
    of the branches that want it and of those that do not, and the outputs are joined again; all
    else of the model runs on the whole batch.
    """

    def __init__(
        self,
        parts: list[Part],
        implementation: str,
        cut: bool = False,
        stop: bool = False,
        among: list[Part] | None = None,
        fork: Joining | None = None,
    ):
        self.parts, self.implementation = parts, implementation
        self.cut, self.stop = cut, stop
        self.among = parts if among is None else among  # all parts of the denoiser call
        self.fork = fork  # None inside of a block, and where all parts have rows from the start

    def wants(self, kind: str, site: str) -> bool:
        """Whether some branch reads or edits the site, or rows join the call at it."""
        if kind == "join":
            return self.fork is not None and site in self.fork.blocks
        return any(site in part.call.wanted[kind] for part in self.parts)

    def _pieces(self, kind: str, site: str) -> list[list[Part]]:
        """Parts one after another: each that wants the site by itself, the others together."""
        pieces: list[list[Part]] = []
        idle = False  # whether the last piece wants nothing
        for part in self.parts:
            if not part.size:  # it joins the call at a later block
                continue
            wants = site in part.call.wanted[kind]
            if wants or not idle:
                pieces.append([part])
            else:
                pieces[-1].append(part)
            idle = not wants
        return pieces

    def _only(self, parts: list[Part]) -> Showing:
        """The context in which a block inside of which other sites are runs for some rows."""
        return Showing(Capture(parts, self.implementation, self.cut, self.stop, self.among))

    def attention(self, call: AttentionCall) -> Tensor | None:
        """The output of an attention call (B, H, N, d); None leaves running it to the tap."""
        pieces, left = self._pieces("attention", call.site), self._left()
        if len(pieces) == 1:
            out = pieces[0][0].attention(call)
        else:
            outs = []
            for own, parts in zip(call.split(_sizes(pieces)), pieces, strict=True):
                wants = call.site in parts[0].call.wanted["attention"]
                answer = parts[0].attention(own) if wants else None
                outs.append(own.run() if answer is None else answer)
            out = torch.cat(outs)
        self._after(left)
        return out

    def block(self, call: BlockCall) -> object | None:
        """The output of a block; None leaves running it to the tap."""
        pieces, left = self._pieces("block", call.site), self._left()
        if len(pieces) == 1:
            out = pieces[0][0].block(call)
        else:
            shares = BlockRows(call, _sizes(pieces), [self._only(parts) for parts in pieces])
            for own, parts in zip(shares.parts, pieces, strict=True):
                if call.site in parts[0].call.wanted["block"]:
                    own.output = parts[0].block(own)
            out = shares.joined()
        self._after(left)
        return out

    def joined(self, given: tuple | dict) -> tuple | dict:
        """Arguments of a block at whose entry rows join the call."""
        return self.fork.entered(given)

    def _left(self) -> bool:
        """Whether some read is still to come."""
        return any(part.pending for part in self.among)

    def _after(self, left: bool) -> None:
        """After the last site nothing needs a graph, or the call is over.

        left: before this site some read was still to come; it is not when a checkpoint computes a
        block again.
        """
        if not left or self._left():
            return
        # An exception cannot leave a compiled graph; there the call runs on to its end.
        if self.stop and not torch.compiler.is_compiling():
            raise StopForward
        if self.cut:
            torch.set_grad_enabled(False)


def _made_before(edit: Edit, site: str, partly: Edit | None) -> str:
    """Why an edit comes too late, and what to do."""
    text = f"{edit.name} edits an attention call whose output another plugin has made already, at "
    if partly is None:
        return f"{text}{site}; name {edit.name} before that plugin"
    return (
        f"{text}{site}: {partly.name}, which acts on some of the images (acts_on); one such plugin "
        "may edit a site, named after all others"
    )


def _sizes(pieces: list[list[Part]]) -> list[int]:
    """Rows of each piece."""
    return [sum(part.size for part in parts) for parts in pieces]
