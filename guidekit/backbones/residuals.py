"""Controls beside a denoiser: they add to its calls exactly what diffusers' pipelines add.

A ControlNet sees the scaled latents of every call; a T2I-Adapter looks at its image once.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter
from torch import Tensor, nn

from guidekit.backbones.base import Denoiser
from guidekit.backbones.control_images import control_pixels
from guidekit.backbones.controls import Control, check_adapter, check_net, load_control
from guidekit.branches import Branch, windowed
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError

HINTS = "control"  # the key of a text that holds what the controls see


@dataclass(eq=False)
class Controls:
    """The controls beside a denoiser; `prepared` with what they see in a run."""

    controls: tuple[Control, ...]
    denoiser: Denoiser
    pixels: list[Tensor] = field(default_factory=list)  # (B, C, H, W) for each
    _features: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def models(self) -> list[nn.Module]:
        """Their networks."""
        return [control.model for control in self.controls]

    @property
    def reads_map(self) -> bool:
        """Whether one of them looks at the conditions' maps."""
        return any(control.image is None for control in self.controls)

    def prepared(self, conditions: Sequence[Condition], size: tuple[int, int]) -> "Controls":
        """The controls with what they see of these conditions, at `size` (H, W).

        Raises GuidekitError for images of another shape, and for an adapter that does not fit.
        """
        own = Controls(self.controls, self.denoiser)
        for control in self.controls:
            if control.is_adapter:
                check_adapter(control.model, self.denoiser, size)
            rows = [
                control_pixels(_image_of(control, condition), control.channels, size)
                for condition in conditions
            ]
            pixels = torch.stack(rows).to(control.model.device, control.model.dtype)
            if control.is_adapter:  # as diffusers hands it over, which decides the last bits
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            own.pixels.append(pixels)
        return own

    def hints(self, branch: Branch, index: int, n: int) -> dict[str, Any]:
        """What call `index` of `n` needs of them for a branch; empty where none acts.

        Tensors have a row for every image, so that branches join along the batch.
        """
        active = [i for i, control in enumerate(self.controls) if control.acts(index, n)]
        if not active:
            return {}
        own: dict[str, Any] = {str(i): self._hint(i, branch) for i in active}
        return {HINTS: own | {"null": torch.full((len(branch.prompts),), branch.null)}}

    def _hint(self, index: int, branch: Branch) -> Any:
        """The image of a ControlNet, the features of an adapter by level, in a branch's window."""
        control, seen = self.controls[index], self.pixels[index]
        if branch.view is not None:
            seen = windowed(seen, *(side * self.denoiser.factor for side in branch.view))
        if not control.is_adapter:
            return seen
        key = (index, branch.view)
        if key not in self._features:
            with torch.no_grad():
                levels = enumerate(control.model(seen))
                self._features[key] = {str(i): control.scale * x for i, x in levels}
        return self._features[key]

    def added(self, z: Tensor, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's arguments for scaled z (B, C, h, w), with what the controls add."""
        hints = given.pop(HINTS, None)
        if hints is None:
            return given
        null, found, adapters = hints.pop("null").to(z.device), [], []
        for index, hint in hints.items():
            control = self.controls[int(index)]
            if control.is_adapter:
                adapters.append(list(hint.values()))
            elif (own := _residuals(control, z, timestep, given, hint, null)) is not None:
                found.append(own)
        if adapters:
            # The UNet takes them out of the list that it is given, and adds in place.
            sums = [_summed(parts).clone() for parts in zip(*adapters, strict=True)]
            given["down_intrablock_additional_residuals"] = sums
        if found:
            downs = zip(*(downs for downs, _ in found), strict=True)
            given["down_block_additional_residuals"] = [_summed(parts) for parts in downs]
            given["mid_block_additional_residual"] = _summed([mid for _, mid in found])
        return given


def _residuals(
    control: Control,
    z: Tensor,
    timestep: Tensor,
    given: dict[str, Any],
    pixels: Tensor,
    null: Tensor,
) -> tuple[list[Tensor], Tensor] | None:
    """A ControlNet's residuals of the skips and of the middle; None where it is left out.

    In guess mode the rows of the null branch get zeros.
    """
    guess = control.guess or control.model.config.global_pool_conditions
    seen = (~null).nonzero()[:, 0] if guess and null.any() else None
    if seen is not None and not len(seen):
        return None
    names = ("encoder_hidden_states", "added_cond_kwargs")
    rows = {"sample": z, "controlnet_cond": pixels} | {k: given[k] for k in names if k in given}
    downs, mid = control.model(
        **_chosen(rows, seen),
        timestep=timestep,
        conditioning_scale=control.scale,
        guess_mode=guess,
        return_dict=False,
    )
    if seen is None:
        return list(downs), mid
    return [_spread(x, seen, len(null)) for x in downs], _spread(mid, seen, len(null))


def _summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum from left to right, as diffusers' Multi classes form it."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _chosen(value: Any, rows: Tensor | None) -> Any:
    """The rows of every tensor, also inside dicts; all of them for None."""
    if rows is None:
        return value
    if isinstance(value, dict):
        return {k: _chosen(v, rows) for k, v in value.items()}
    return value[rows]


def _spread(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Values of some rows among `count` rows, the others zero."""
    return x.new_zeros(count, *x.shape[1:]).index_copy(0, rows, x)


def _image_of(control: Control, condition: Condition) -> Any:
    if control.image is not None:
        return control.image
    if condition.map is None:
        raise GuidekitError(
            "a control has no image and its condition no map; give --control FOLDER=IMAGE.png, or "
            "--map MAP.png"
        )
    return condition.map


def with_controls(denoiser: Denoiser, controls: Control | Sequence[Control]) -> Denoiser:
    """A view of the denoiser beside which the controls act; itself without any.

    Raises GuidekitError for a denoiser that takes none, and for a control of another family.
    """
    several = [controls] if isinstance(controls, Control) else list(controls)
    if not several:
        return denoiser
    if wrong := [c for c in several if not isinstance(c, Control)]:
        raise GuidekitError(
            f"controls are guidekit.Control(model, image), not {type(wrong[0]).__name__}"
        )
    if not denoiser.takes_controls:
        raise GuidekitError(
            f"{type(denoiser.pipeline).__name__} takes no controls; they go with Stable Diffusion "
            "and SDXL"
        )
    view = copy.copy(denoiser)
    view.controls = Controls(tuple(_loaded(control, denoiser) for control in several), denoiser)
    return view


def _loaded(control: Control, denoiser: Denoiser) -> Control:
    """The control with its network, where it was given by name; it fits the denoiser."""
    if isinstance(control.model, str | Path):
        model = load_control(control.model, denoiser.device, denoiser.model.dtype)
        control = replace(control, model=model)
    if not isinstance(control.model, ControlNetModel | T2IAdapter):
        raise GuidekitError(
            f"a control's model is a ControlNetModel, a T2IAdapter or a folder, not "
            f"{type(control.model).__name__}"
        )
    if not control.is_adapter:
        check_net(control.model, denoiser.model)
    return control
