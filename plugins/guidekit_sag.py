"""Self-attention guidance: away from an image that is blurred where self-attention looks.

Hong, Lee, Jang, Kim: Improving Sample Quality of Diffusion Models Using Self-Attention Guidance,
ICCV 2023, arXiv:2210.00939, Algorithm 1: the clean estimate is blurred where the pixels of the
middle block receive more attention than on average, noised again by its own noise, and evaluated
once more. Of the null branch where there is one (eq. 25), else of the conditional one. In joint
attention (SD3, Flux) the attention is that among pixels. The term builds no graph: a gradient
method beside it sees it as a constant.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit import AttentionCall, Branch, Guidance, GuidekitError, Run, Step, hookimpl
from guidekit.toolbox import pixel_rows, probabilities, self_attention


@dataclass(kw_only=True)
class SelfAttention(Guidance):
    """Pushes away from the output for a z that is blurred where attention gathers.

    It costs one more denoiser call a step, which waits for the first.
    """

    plugin = "sag"

    scale: float = 0.75  # s, added to classifier-free guidance
    threshold: float = 1.0  # attention received, above which a pixel is blurred; the mean is 1
    blur: float = 1.0  # standard deviation of the Gaussian, in latent pixels
    size: int = 9  # side of its kernel, odd
    site: str = ""  # the module whose self-attention counts; none is the first of the middle

    def __post_init__(self):
        super().__post_init__()
        if not self.blur > 0 or self.size < 1 or self.size % 2 == 0:
            raise GuidekitError(f"{self.name}: blur is above 0, and size is odd")

    def prepare(self, run: Run) -> None:
        """Finds the site; raises GuidekitError for one without self-attention."""
        model = run.denoiser.model
        possible = self_attention(model, run.denoiser.family)
        if not possible:
            raise GuidekitError(
                f"{self.name} reads self-attention with a softmax, and {type(model).__name__} has "
                "none; use slg or autoguidance"
            )
        sites = run.sites([self.site or "middle self-attention"])
        (self._at,) = run.tap_attention(self, list(sites)[:1])
        if self._at not in possible:
            there = ", ".join(possible)
            raise GuidekitError(f"{self.name}.site: {self._at} reads text; there are {there}")
        self._grid = sites[self._at]
        half = min(*run.grid, self.size // 2 + 1) - 1
        line = torch.arange(-half, half + 1.0, device=run.device)
        self._line = torch.exp(-0.5 * (line / self.blur) ** 2)

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Leaves them; chooses the one that is blurred."""
        names = [b.name for b in branches if b.images is None and b.view is None]
        self._base = next((name for name in ("null", "cond") if name in names), "")
        if not self._base:
            raise GuidekitError(
                f"{self.name} blurs the branch 'null' or 'cond', which another plugin has replaced "
                f"by {', '.join(b.name for b in branches)}; use them in two windows of steps"
            )
        return branches

    def touches(self, branch: Branch) -> bool:
        """The branch that is blurred."""
        return branch.name == self._base

    def edit_attention(self, step: Step, branch: Branch, call: AttentionCall) -> None:
        """Notes where attention gathers: (B, 1, h, w), 1 and 0; the call stays as it is."""
        rows = pixel_rows(step.run, call)
        query, key = call.query[:, :, rows].detach(), call.key[:, :, rows].detach()
        mask = None if call.mask is None else call.mask[..., rows, rows].detach()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        received = probabilities(query, key, mask, call.scale).mean(1).sum(1)
        self._mask = (received > self.threshold).to(received.dtype).unflatten(1, (1, *self._grid))

    def combine(self, step: Step, outs: dict[str, Tensor], combined: Tensor) -> Tensor:
        """Adds the difference of the output and of that for the blurred image."""
        if not step.informative:  # no image yet that could be blurred
            return combined
        out, z, level = outs[self._base].detach(), step.z.detach(), step.level
        x0, eps = level.x0(out, z), level.eps(out, z)
        mask = F.interpolate(self._mask, z.shape[-2:]).to(x0)
        x0 = mask * self._blurred(x0) + (1 - mask) * x0
        noised = (level.a * x0 + level.s * eps).to(z.dtype)
        worse = step.denoise(
            step.model_input(noised), step.timestep, self, branch=self._base, graph=False
        )
        amount = self.scale * self.schedule(step.frac)
        return combined + amount * (out - worse.out)

    def _blurred(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) under the Gaussian, mirrored at the edges."""
        line = (self._line / self._line.sum()).to(x)
        kernel, half = torch.outer(line, line)[None, None], math.floor(len(line) / 2)
        padded = F.pad(x, (half, half, half, half), mode="reflect")
        return F.conv2d(padded.flatten(0, 1)[:, None], kernel).view_as(x)


@hookimpl
def register_guidance(register):
    """Offers `sag`."""
    register("sag", SelfAttention)
