"""Classifier-free guidance: another scale, rescaled contrast, and an interval of steps.

The sampler does classifier-free guidance by itself (Ho & Salimans 2022, arXiv:2207.12598, with
diffusers' scale, which is their w + 1). This plugin changes it: rescaling by Lin, Liu, Li and Yang:
Common diffusion noise schedules and sample steps are flawed, 2023, arXiv:2305.08891, section 3.4;
the scale of controls apart from that of the prompt by Avrahami et al.: SpaText, CVPR 2023,
arXiv:2211.14305 (after Brooks et al. 2023, arXiv:2211.09800, whose differences are chained);
the interval by Kynkaanniemi et al.: Applying guidance in a limited interval improves sample and
distribution quality in diffusion models, 2024, arXiv:2404.07724, section 3.1, in noise levels by
sigma_start and sigma_stop, as there, or in fractions of the steps.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from guidekit import Branch, Guidance, GuidekitError, Level, Run, Step, hookimpl


@dataclass(kw_only=True)
class ClassifierFree(Guidance):
    """Changes classifier-free guidance; outside of start and stop there is none, nor its call.

    Name it before plugins that add branches with nulls of their own (multidiffusion): they take
    the scale from the conditional branch, and rescaling sees each of their groups.
    """

    plugin = "cfg"

    scale: float = 1.0  # 1 on, 0 off; the strength is cfg_scale
    cfg_scale: float = 0.0  # diffusers' guidance scale; 0 is the run's
    rescale: float = 0.0  # phi: share of the output that has the conditional one's contrast
    control_scale: float = 0.0  # of the controls, apart from the prompt's; 0: one scale for both

    waived: ClassVar[dict[str, str]] = {
        "window": "outside of its interval there is no classifier-free guidance, by the paper"
    }

    def __post_init__(self):
        super().__post_init__()
        if self.scale not in (0, 1):
            raise GuidekitError(f"cfg.scale is 1 (on) or 0 (off), not {self.scale}; set cfg_scale")
        if not 0 <= self.cfg_scale < float("inf"):
            raise GuidekitError(f"cfg.cfg_scale must be a finite number >= 0, not {self.cfg_scale}")
        if not 0 <= self.rescale <= 1:
            raise GuidekitError(f"cfg.rescale lies between 0 and 1, not {self.rescale}")
        if not 0 <= self.control_scale < float("inf"):
            raise GuidekitError(
                f"cfg.control_scale must be a finite number >= 0, not {self.control_scale}"
            )

    def active(self, frac: float, level: Level) -> bool:
        """Always: outside of its interval it takes the null branch away."""
        return self.scale != 0

    def prepare(self, run: Run) -> None:
        """Raises GuidekitError for options that change nothing in this run."""
        window = (self.start, self.stop, self.sigma_start, self.sigma_stop)
        if self.control_scale and run.controls is None:
            raise GuidekitError("cfg.control_scale is of controls; give --control, or leave it out")
        if self.control_scale and (self.cfg_scale or run.cfg) <= 1:
            raise GuidekitError(
                "cfg.control_scale is added to the null branch, which there is at a guidance scale "
                "above 1; set cfg_scale"
            )
        own = (self.cfg_scale, self.rescale, self.control_scale)
        if not any(own) and window == (0, 1, None, None):
            raise GuidekitError(
                "cfg changes nothing: set cfg_scale, rescale, control_scale, start, stop, "
                "sigma_start or sigma_stop"
            )
        if (self.cfg_scale or run.cfg) <= 1 and not (self.cfg_scale and run.cfg > 1):
            raise GuidekitError(
                f"cfg has nothing to change at the run's guidance scale {run.cfg:g}: set cfg_scale"
            )

    def branches(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Conditional branches alone outside of the interval; inside, with the own scales."""
        inside = self.inside(step.frac, step.level)
        scaled = self._scaled(step, branches, inside)
        return self._apart(step, scaled) if inside and self.control_scale else scaled

    def _apart(self, step: Step, branches: list[Branch]) -> list[Branch]:
        """Null and prompt without the controls, and the controls without the prompt."""
        for branch in branches:
            branch.controlled &= branch.group != "main"
        negatives = [c.negative for c in step.run.conditions]
        text = step.run.text(negatives, null=True)
        return [*branches, Branch("control", negatives, self.control_scale, text=text)]

    def _scaled(self, step: Step, branches: list[Branch], inside: bool) -> list[Branch]:
        """The branches with the own scale of the prompt."""
        cond = next((b for b in branches if b.name == "cond"), None)
        before = cond.weight if cond else step.run.cfg
        scale = (self.cfg_scale or step.run.cfg) if inside else 1.0
        weight = scale if scale > 1 else None
        if weight == before:
            return branches
        # Regions of other plugins have the conditional branch's weight, and get the new one; a
        # group without a null (pag) has its one branch for a base.
        for branch in branches:
            guided = before is not None or branch.group == "main"
            if guided and not branch.null and branch.weight == before:
                branch.weight = weight
        if weight is None:
            return [b for b in branches if not b.null]
        if before is None:
            negatives = [c.negative for c in step.run.conditions]
            branches = [Branch("null", negatives, null=True), *branches]
        return branches

    def combine(self, step: Step, outs: dict[str, Tensor], combined: Tensor) -> Tensor:
        """The combination of every group with the contrast of its conditional output."""
        for branch in step.branches if self.rescale else ():
            if branch.null or branch.weight is None:
                continue
            if branch.name == "cond":
                combined = rescaled(combined, outs["cond"], self.rescale)
            elif branch.group in step.groups:
                group = step.groups[branch.group]
                step.groups[branch.group] = rescaled(group, outs[branch.name], self.rescale)
        return combined

    @classmethod
    def example(cls) -> "ClassifierFree":
        """Rescales in the whole run."""
        return cls(rescale=0.7)


def rescaled(combined: Tensor, cond: Tensor, share: float) -> Tensor:
    """Outputs (B, C, h, w) whose standard deviation is the conditional one's, mixed in by `share`.

    Lin et al. 2023, section 3.4, in the order of operations of diffusers' rescale_noise_cfg.
    """
    dims = list(range(1, cond.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / combined.std(dim=dims, keepdim=True)
    return share * (combined * ratio) + (1 - share) * combined


@hookimpl
def register_guidance(register):
    """Offers `cfg`."""
    register("cfg", ClassifierFree)
