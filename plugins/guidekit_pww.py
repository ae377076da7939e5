"""Paint-with-Words: phrases are drawn where their masks say, by a bias on cross-attention logits.

Balaji et al.: eDiff-I: Text-to-image diffusion models with an ensemble of expert denoisers, 2022,
arXiv:2211.01324, section 5: softmax((Q K^T + w A) / sqrt(d)) V with w = w' log(1 + sigma)
max(Q K^T). The maximum is of each image by itself here, so that an image does not depend on its
batch; the code that circulates (cloneofsimo/paint-with-words-sd) takes it over the whole batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from guidekit import AttentionCall, Branch, Guidance, GuidekitError, Level, Run, Step, hookimpl
from guidekit.toolbox import require_segments, segment_masks, segment_strengths, segment_weights

LOGITS = 2**25  # numbers that may be in memory at once


@dataclass(kw_only=True)
class PaintWithWords(Guidance):
    """Adds to the logits of each masked phrase inside its mask, in the conditional branch only.

    It builds no graph: a gradient method beside it sees the bias as a constant.
    """

    plugin = "pww"

    scale: float = 0.4  # w'
    sites: tuple[str, ...] = ()  # wildcards; none is every module where pixels read text
    # Over noise levels: log(1 + sigma); log(1 + sigma^2); sqrt(1 - abar); 1.
    growth: Literal["log", "log2", "noise", "constant"] = "log"
    statistic: Literal["max", "std"] = "max"  # of each image's logits

    needs = ("text",)

    def prepare(self, run: Run) -> None:
        """Finds the tokens of the phrases and the sites, and draws the areas at their grids."""
        require_segments(run.conditions, "pww")
        sites = self._sites(run)
        run.tap_attention(self, list(sites))
        tokens = segment_weights(run.denoiser.tokenizers, run.conditions, run.text_length)
        tokens = tokens * segment_strengths(run.conditions)[:, None]
        self._words = tokens.to(run.device)  # (B, T, S)
        grids = set(sites.values())
        masks = {g: segment_masks(run.conditions, *g).flatten(2).to(run.device) for g in grids}
        self._segments = {site: masks[grid] for site, grid in sites.items()}  # each (B, S, N)

    def _sites(self, run: Run) -> dict[str, tuple[int, int]]:
        """Cross-attention sites with their grids; raises GuidekitError for those without text."""
        cross = run.sites(list(run.denoiser.family.cross_sites))
        chosen = run.sites(list(self.sites or cross))
        if others := [site for site in chosen if site not in cross]:
            raise GuidekitError(
                f"pww.sites: {', '.join(others)} read no text; those that do: {', '.join(cross)}"
            )
        return chosen

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Leaves them; notes how strongly this level is painted, before the denoiser is called.

        A tensor, as numbers of a step would be constants of a compiled denoiser.
        """
        wide = torch.promote_types(step.z.dtype, torch.float32)
        amount = self.scale * self._level_factor(step)
        self._amount = torch.full((1, 1, 1), amount, dtype=wide, device=step.run.device)
        return branches

    def edit_attention(self, step: Step, branch: Branch, call: AttentionCall) -> None:
        """Biases the logits (B, H, N, T) of pixels and text by masks (B, S, N) times words."""
        if call.index > 0:  # an IP-Adapter's image tokens
            return
        segments, words = self._segments[call.site], self._words
        n, t, n_text = call.query.shape[2], call.key.shape[2], words.shape[1]
        family = step.run.denoiser.family
        rows, keys = family.rows(n, n_text), family.text_keys(t, n_text)
        strength = self._amount * self._statistic(call, rows, keys)
        call.paint(_placed(strength * segments, -1, n, rows), _placed(words, -2, t, keys))

    def _level_factor(self, step: Step) -> float:
        """How strongly this noise level is painted; the paper's log(1 + sigma) by default."""
        level: Level = step.level
        if self.growth == "constant":
            return 1.0
        if self.growth == "noise":  # sqrt(1 - abar), as in ZestGuide's code
            return level.s / math.hypot(level.a, level.s)
        # At a = 0, the first step of flow models, sigma is infinite.
        sigma = level.sigma if level.a else step.next_level.sigma
        return math.log1p(sigma if self.growth == "log" else sigma**2)

    def _statistic(self, call: AttentionCall, rows: slice, keys: slice) -> Tensor:
        """Maximum or deviation of each image's scaled logits, (B, 1, 1), without gradient.

        Of pixels and text; as many heads at a time as `LOGITS` allows, on a GPU mostly all.
        """
        query, key = call.query[:, :, rows], call.key[:, :, keys]
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        if (group := query.shape[1] // key.shape[1]) > 1:  # grouped-query attention
            key = key.repeat_interleave(group, dim=1)
        wide = torch.promote_types(call.query.dtype, torch.float32)
        at_once = max(LOGITS // (query.shape[2] * key.shape[2] * len(query)), 1)
        with torch.no_grad():
            parts = [
                self._reduced(q.to(wide) @ k.to(wide).mT)
                for q, k in zip(query.split(at_once, 1), key.split(at_once, 1), strict=True)
            ]
            if self.statistic == "max":
                most = parts[0] if len(parts) == 1 else torch.stack(parts).amax(0)
                return most[:, None, None] * scale
            mean, square = torch.cat(parts, 1).mean(1).unbind(-1)
            return (square - mean**2).clamp(min=0).sqrt()[:, None, None] * scale

    def _reduced(self, logits: Tensor) -> Tensor:
        """What is kept of the logits (B, heads, N, T): their maximum, or means of each head."""
        if self.statistic == "max":
            return logits.amax((1, 2, 3))
        return torch.stack([logits.mean((2, 3)), logits.square().mean((2, 3))], -1)


def _placed(x: Tensor, dim: int, size: int, part: slice) -> Tensor:
    """x at `part` of a dimension of `size`, zeros elsewhere; in joint attention text and pixels."""
    start, stop, _ = part.indices(size)
    if (start, stop) == (0, size):
        return x
    shape = list(x.shape)
    shape[dim] = size
    full = x.new_zeros(shape)
    full.narrow(dim, start, stop - start).copy_(x)
    return full


@hookimpl
def register_guidance(register):
    """Offers `pww`."""
    register("pww", PaintWithWords)
