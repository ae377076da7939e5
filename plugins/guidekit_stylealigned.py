"""StyleAligned: images of one group in one style, by attention to the first of them.

Hertz, Voynov, Fruchter, Cohen-Or: Style Aligned Image Generation via Shared Attention, CVPR 2024,
arXiv:2312.02133, section 3.2: queries and keys of an image get the mean and deviation of those of
the first image (AdaIN), and its pixels attend to the first one's as well as to its own. The
released code also shares the statistics of group norms, which the paper has not; here they stay the
image's. In joint attention (SD3, Flux) that is done for pixels, and the first one's text is not
read.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from guidekit import AttentionCall, Branch, Guidance, GuidekitError, Run, Step, hookimpl
from guidekit.toolbox import pixel_rows

EPS = 1e-5  # of the variances


@dataclass(kw_only=True)
class StyleAligned(Guidance):
    """Lets the images of a group attend to the first one, which stays as it is.

    Groups are made by `--particles`, or `Condition.group`, with a prompt for each image.
    """

    plugin = "stylealigned"

    scale: float = 1.0  # factor on the attention to the first image, by a shift of its logits
    queries: bool = True  # AdaIN of the queries
    keys: bool = True  # AdaIN of the keys
    sites: tuple[str, ...] = ("self-attention",)  # wildcards of self-attention

    grouped = True

    def __post_init__(self):
        super().__post_init__()
        if self.scale < 0:
            raise GuidekitError(f"{self.name}.scale is a factor of at least 0, not {self.scale}")

    def prepare(self, run: Run) -> None:
        """Finds the sites, and for each image the first one of its group."""
        run.tap_attention(self, list(self.sites))
        first = {row: members[0] for members in run.groups for row in members}
        self._first = torch.tensor([first[row] for row in range(len(first))], device=run.device)
        others = [row for row in first if first[row] != row]
        self._alone = torch.tensor([r for r in first if r not in others], device=run.device)
        self._others = torch.tensor(others, device=run.device)
        if not others:
            run.account.note(
                f"{self.name}: no two images are of one group; use --particles, or Condition.group"
            )

    def touches(self, branch: Branch) -> bool:
        """Every branch: each shares with the first image's of its own."""
        return True

    def edit_attention(self, step: Step, branch: Branch, call: AttentionCall) -> Tensor | None:
        """The output (B, H, N, d): of first images as it was, of others with shared keys."""
        if call.index > 0 or not len(self._others):  # an IP-Adapter's image tokens
            return None
        rows = pixel_rows(step.run, call)
        output = call.query.new_empty(*call.query.shape[:3], call.value.shape[3])
        for chosen, shares in ((self._alone, False), (self._others, True)):
            own = _rows(call, chosen)
            if shares:
                self._share(own, _rows(call, self._first[chosen]), rows)
            output = output.index_copy(0, chosen, own.run().to(output.dtype))
        return output

    def _share(self, call: AttentionCall, first: AttentionCall, rows: slice) -> None:
        """AdaIN to the first images' pixels, then their keys and values beside the own ones."""
        count = call.query.shape[2], call.key.shape[2]
        if count[0] != count[1]:
            raise GuidekitError(f"{self.name}.sites: {call.site} is no self-attention")
        if self.queries:
            call.query = _styled(call.query, first.query, rows)
        if self.keys:
            call.key = _styled(call.key, first.key, rows)
        shared = first.key[:, :, rows].shape[2]
        call.key = torch.cat([call.key, first.key[:, :, rows]], 2)
        call.value = torch.cat([call.value, first.value[:, :, rows]], 2)
        if call.mask is not None:
            call.mask = torch.cat([call.mask, first.mask[..., rows]], -1)
        if self.scale != 1:
            shift = call.query.new_zeros(1, 1, 1, count[1] + shared)
            shift[..., count[1] :] = math.log(self.scale)
            call.bias(shift)


def _rows(call: AttentionCall, rows: Tensor) -> AttentionCall:
    """The call of some images."""
    own = call.mask is not None and call.mask.ndim == 4 and len(call.mask) == len(call.query)
    return replace(
        call,
        query=call.query[rows],
        key=call.key[rows],
        value=call.value[rows],
        mask=call.mask[rows] if own else call.mask,
    )


def _styled(own: Tensor, first: Tensor, rows: slice) -> Tensor:
    """Own tokens (B, H, N, d), those of `rows` with the mean and deviation of the first one's."""
    new = own.clone()
    x, style = own[:, :, rows], first[:, :, rows]
    mean, style_mean = x.mean(2, keepdim=True), style.mean(2, keepdim=True)
    std, style_std = ((t.var(2, keepdim=True) + EPS).sqrt() for t in (x, style))
    new[:, :, rows] = (x - mean) / std * style_std + style_mean
    return new


@hookimpl
def register_guidance(register):
    """Offers `stylealigned`."""
    register("stylealigned", StyleAligned)
