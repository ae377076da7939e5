"""What one denoiser call passes to guidances and what is read from it."""

from fnmatch import fnmatchcase

import torch
from torch import Tensor

from guidekit.attention.call import AttentionCall, attend
from guidekit.attention.maps import resized_logits, token_maps
from guidekit.backbones.padding import aligned, reorder, taken
from guidekit.backbones.records import in_pixels, site_features, site_grid
from guidekit.branches import Branch
from guidekit.guidance import Guidance
from guidekit.reads import AttentionRead, FeatureRead
from guidekit.step import Step
from guidekit.taps import BlockCall


class StopForward(Exception):
    """Ends a denoiser call after its last site."""


class Capture:
    """Edits and reads of one call; `found` maps (id of the read, site) to what was read.

    cut: no graph is built after the last site has been read. stop: the call ends there.
    """

    def __init__(
        self,
        step: Step,
        branch: Branch,
        reads: list[AttentionRead | FeatureRead],
        editors: list[Guidance],
        cut: bool,
        stop: bool = False,
    ):
        self.step, self.branch, self.editors = step, branch, editors
        self.maps = [r for r in reads if isinstance(r, AttentionRead)]
        self.blocks = [r for r in reads if isinstance(r, FeatureRead)]
        self.cut, self.stop = cut, stop
        self.found: dict[tuple[int, str], Tensor] = {}
        self.pending = {site for r in reads for site in r.sites}

    def attention(self, call: AttentionCall) -> Tensor | None:
        """Shows the call to the editors, then reads it; None leaves running it to the tap."""
        ledger = self.step.run.reads
        editors = [g for g in self.editors if call.site in ledger.edited(g, "attention")]
        reads = [r for r in self.maps if call.site in r.sites]
        order = self._order(call.site, call.query.shape[2]) if editors or reads else None
        if order is None:
            return self._shown(call, editors, reads)
        reorder(call, order)
        out = self._shown(call, editors, reads)
        return taken(call.run() if out is None else out, order.argsort(1))

    def _shown(
        self, call: AttentionCall, editors: list[Guidance], reads: list[AttentionRead]
    ) -> Tensor | None:
        """Edits and reads of a call in which every picture's text has the same columns."""
        for guidance in editors:
            guidance.edit_attention(self.step, self.branch, call)
        if not reads or call.index > 0:  # further calls are an IP-Adapter's image tokens
            return None
        out = self._read(call, reads)
        self.step.run.account.attended(call.site, call.implementation)
        self._done(call.site)
        return out

    def _order(self, site: str, count: int) -> Tensor | None:
        """Order (B, count) that gives all pictures the same columns; None if they have them."""
        run = self.step.run
        joint = any(fnmatchcase(site, pattern) for pattern in run.denoiser.family.cross_sites)
        if len(set(run.text_lengths)) == 1 or not joint:
            return None
        return aligned(run.text_lengths, count)

    def block(self, call: BlockCall) -> object | None:
        """Shows the block to the editors, each after what the one before made, and reads it."""
        ledger = self.step.run.reads
        for guidance in self.editors:
            if call.site in ledger.edited(guidance, "block"):
                output = guidance.edit_block(self.step, self.branch, call)
                call.output = call.output if output is None else output
        reads = [r for r in self.blocks if call.site in r.sites]
        if not reads:
            return None
        output = call.run()
        features = self._features(output, call.site)
        for read in reads:
            self.found.setdefault((id(read), call.site), features)
        self._done(call.site)
        return output

    def _features(self, output: object, site: str) -> Tensor:
        """Features (B, C, h, w) of the pixels out of a block's output."""
        run, model = self.step.run, self.step.run.denoiser.model
        if not in_pixels(model, output):
            tokens = output if isinstance(output, Tensor) else output[-1]
            h, w = site_grid(model, site, *run.grid)
            packed = tokens.shape[1] != h * w  # text and pixels in one sequence
            order = self._order(f"{site}.attn", tokens.shape[1]) if packed else None
            output = tokens if order is None else taken(tokens, order)
        return site_features(model, site, output, run.grid)

    def _done(self, site: str) -> None:
        """After the last site nothing needs a graph, or the call is over."""
        if site not in self.pending:  # a block computed again in backward
            return
        self.pending.discard(site)
        if self.pending:
            return
        if self.stop:
            raise StopForward
        if self.cut:
            torch.set_grad_enabled(False)

    def _read(self, call: AttentionCall, reads: list[AttentionRead]) -> Tensor:
        """Runs the call and keeps its maps; plain reads share one pass."""
        family = self.step.run.denoiser.family
        n_text = reads[0].weights.shape[1]
        rows = family.rows(call.query.shape[2], n_text)
        plain = [r for r in reads if r.plain]
        if plain:
            weights = torch.cat([_placed(r.weights, family, call) for r in plain], -1)
            out, maps = attend(call, weights, rows=rows, columns=_columns(plain, family, call))
            for read, part in zip(
                plain, maps.split([r.weights.shape[-1] for r in plain], 1), strict=True
            ):
                self._keep(read, call.site, part)
        else:
            out = call.run()
        for read in reads:
            if read not in plain:
                self._keep(read, call.site, _variant(call, read, family, rows))
        return out

    def _keep(self, read: AttentionRead, site: str, maps: Tensor) -> None:
        """Maps (..., N) as pictures (..., h, w), the first time only."""
        self.found.setdefault((id(read), site), maps.unflatten(-1, read.shape(site)))


def _placed(weights: Tensor, family, call: AttentionCall) -> Tensor:
    """Weights (B, T, S) of text tokens at the columns that text has among the call's keys."""
    keys, n_text = call.key.shape[2], weights.shape[1]
    if keys == n_text:
        return weights
    full = weights.new_zeros(len(weights), keys, weights.shape[2])
    full[:, family.text_keys(keys, n_text)] = weights
    return full


def _columns(reads: list[AttentionRead], family, call: AttentionCall) -> list[int]:
    """The call's keys that have weight in some read."""
    keys, n_text = call.key.shape[2], reads[0].weights.shape[1]
    text = range(keys) if keys == n_text else range(keys)[family.text_keys(keys, n_text)]
    return [text[i] for i in sorted(frozenset().union(*(read.columns for read in reads)))]


def _variant(call: AttentionCall, read: AttentionRead, family, rows: slice) -> Tensor:
    """Maps per head, over some of the tokens, or with further keys in the softmax."""
    key, weights, mask = call.key, _placed(read.weights, family, call), call.whole_mask()
    if read.tokens is not None:
        allowed = torch.zeros(len(read.tokens), key.shape[2], dtype=torch.bool, device=key.device)
        n_text = read.weights.shape[1]
        allowed[:, family.text_keys(key.shape[2], n_text)] = read.tokens.to(key.device)
        mask = _both(mask, allowed[:, None, None], call)
    if read.extra is not None:
        extra = _extra_keys(call, read.extra)
        key = torch.cat([key, extra], 2)
        weights = torch.nn.functional.pad(weights, (0, 0, 0, extra.shape[2]))
        mask = None if mask is None else _open(mask, extra.shape[2])
    query = call.query[:, :, rows]
    mask = _cut_rows(mask, rows)
    if read.resize:
        query, mask = resized_logits(query, mask, read.sites[call.site], read.resize)
    reduce = "none" if read.per_head else "mean"
    return token_maps(query, key, weights, mask, call.scale, reduce=reduce)


def _cut_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The rows of a mask (B or 1, H or 1, N or 1, T), which may be one for all queries."""
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]


def _both(mask: Tensor | None, allowed: Tensor, call: AttentionCall) -> Tensor:
    """The call's mask with the tokens outside `allowed` shut."""
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, float("-inf"))


def _open(mask: Tensor, count: int) -> Tensor:
    """The mask with `count` open columns more."""
    value = True if mask.dtype == torch.bool else 0.0
    return torch.nn.functional.pad(mask, (0, count), value=value)


def _extra_keys(call: AttentionCall, states: Tensor) -> Tensor:
    """Keys (B, H, E, d) of text states (E, D), by the module's own projection."""
    batch, heads, _, d = call.key.shape
    projected = call.module.to_k(states.to(call.key.dtype))
    return projected.view(1, -1, heads, d).transpose(1, 2).expand(batch, -1, -1, -1)
