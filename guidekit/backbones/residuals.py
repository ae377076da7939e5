"""Controls beside a denoiser: they add to its calls exactly what diffusers' pipelines add.

A ControlNet sees the scaled latents of every call; all others look at their image once.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from guidekit.backbones.base import Denoiser
from guidekit.backbones.control_images import control_pixels
from guidekit.backbones.controls import (
    KINDS,
    Control,
    check_adapter,
    check_further,
    check_net,
    check_widths,
    control_labels,
    load_control,
)
from guidekit.backbones.map_encoder import MapEncoder
from guidekit.backbones.segment_map import SegmentMap, segment_maps
from guidekit.branches import Branch, windowed
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.labels import LabelMap, check_labels

HINTS = "control"  # the key of a text that holds what the controls see


@dataclass(eq=False)
class Controls:
    """The controls beside a denoiser; `prepared` with what they see in a run."""

    controls: tuple[Control, ...]
    denoiser: Denoiser
    pixels: list[Tensor] = field(default_factory=list)  # (B, C, H, W) of what each looks at
    _features: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def models(self) -> list[nn.Module]:
        """Their networks."""
        return [control.model for control in self.controls]

    @property
    def reads_map(self) -> bool:
        """Whether one of them looks at the conditions' maps."""
        return any(control.reads_map for control in self.controls)

    @property
    def further(self) -> int:
        """Channels that they make beside the latents."""
        return sum(control.further for control in self.controls)

    def prepared(self, conditions: Sequence[Condition], size: tuple[int, int]) -> "Controls":
        """The controls with what they see of these conditions, at `size` (H, W).

        Raises GuidekitError for images of another shape, and for an adapter that does not fit.
        """
        own = Controls(self.controls, self.denoiser)
        for control in self.controls:
            if control.is_adapter:
                check_adapter(control.model, self.denoiser, size)
            pixels = self._looked_at(control, conditions, size)
            pixels = pixels.to(control.model.device, control.model.dtype)
            if control.is_adapter:  # as diffusers hands it over, which decides the last bits
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            own.pixels.append(pixels)
        return own

    def _looked_at(
        self, control: Control, conditions: Sequence[Condition], size: tuple[int, int]
    ) -> Tensor:
        """What a control sees of each condition, (B, C, H, W); segments on the latents' grid."""
        if isinstance(control.model, SegmentMap):
            grid = (size[0] // self.denoiser.factor, size[1] // self.denoiser.factor)
            return segment_maps(control.model, self.denoiser.pipeline, conditions, grid)
        images = (_image_of(control, condition) for condition in conditions)
        return torch.stack([control_pixels(image, control.channels, size) for image in images])

    def hints(self, branch: Branch, index: int, n: int) -> dict[str, Any]:
        """What call `index` of `n` needs of them for a branch; empty where none acts.

        Tensors have a row for every image, so that branches join along the batch.
        """
        acting = [c.acts(index, n) for c in self.controls]
        own = {
            str(i): self._hint(i, branch, acts)
            for i, acts in enumerate(acting)
            if acts or self.controls[i].further  # the model reads its channels at every call
        }
        if not own:
            return {}
        rows = len(branch.prompts)
        null, silent = (torch.full((rows,), x) for x in (branch.null, not branch.controlled))
        return {HINTS: own | {"null": null, "silent": silent}}

    def _hint(self, index: int, branch: Branch, acts: bool) -> Any:
        """What a control adds to a branch, in its window: by level for an adapter.

        Of a ControlNet it is the image, as it adds another thing at every call.
        """
        control, seen = self.controls[index], self.pixels[index]
        if branch.view is not None:
            factor = 1 if control.further else self.denoiser.factor
            seen = windowed(seen, *(side * factor for side in branch.view))
        if not control.looks_once:
            return seen
        says = branch.controlled and (control.is_adapter or not branch.null)
        key = (index, branch.view, says, acts)
        if key not in self._features:
            with torch.no_grad():
                self._features[key] = _features(control, seen, says, acts)
        return self._features[key]

    def added(
        self, z: Tensor, timestep: Tensor, given: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The denoiser's input and arguments for scaled z (B, C, h, w), with what they add."""
        hints = given.pop(HINTS, None)
        if hints is None:
            return z, given
        null, silent = (hints.pop(name).to(z.device) for name in ("null", "silent"))
        found, adapters, tokens, further = [], [], [], [z]
        for index, hint in hints.items():
            control = self.controls[int(index)]
            if control.is_adapter:
                adapters.append(list(hint.values()))
            elif isinstance(control.model, MapEncoder):
                tokens.append(hint)
            elif isinstance(control.model, SegmentMap):
                further.append(hint.to(z.dtype))
            elif (own := _residuals(control, z, timestep, given, hint, null, silent)) is not None:
                found.append(own)
        if adapters:
            # The UNet takes them out of the list that it is given, and adds in place.
            sums = [_summed(parts).clone() for parts in zip(*adapters, strict=True)]
            given["down_intrablock_additional_residuals"] = sums
        if found:
            downs = zip(*(downs for downs, _ in found), strict=True)
            given["down_block_additional_residuals"] = [_summed(parts) for parts in downs]
            given["mid_block_additional_residual"] = _summed([mid for _, mid in found])
        if tokens:  # after the prompt's, whose columns stay where they are
            states = given["encoder_hidden_states"]
            given["encoder_hidden_states"] = torch.cat([states, *tokens], 1)
        return torch.cat(further, 1), given


def _features(control: Control, seen: Tensor, says: bool, acts: bool) -> Any:
    """What a control that looks once adds to a branch, for what it sees (B, C, H, W).

    says: whether the branch is told; an adapter tells the null branch too, as diffusers' pipelines
    have it.
    """
    if control.is_adapter:
        scale = control.scale if says else 0.0
        return {str(i): scale * x for i, x in enumerate(control.model(seen))}
    if isinstance(control.model, SegmentMap):
        return (control.scale if says and acts else 0.0) * seen
    null = control.model(torch.zeros_like(seen))
    return torch.lerp(null, control.model(seen), control.scale) if says else null


def _residuals(
    control: Control,
    z: Tensor,
    timestep: Tensor,
    given: dict[str, Any],
    pixels: Tensor,
    null: Tensor,
    silent: Tensor,
) -> tuple[list[Tensor], Tensor] | None:
    """A ControlNet's residuals of the skips and of the middle; None where it is left out.

    Silent rows get zeros, in guess mode those of the null branch too.
    """
    guess = control.guess or control.model.config.global_pool_conditions
    left_out = silent | null if guess else silent
    seen = (~left_out).nonzero()[:, 0] if left_out.any() else None
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
    """What a control looks at. Raises GuidekitError for nothing, and for a map of other classes."""
    found = condition.map if control.image is None else control.image
    if found is None:
        raise GuidekitError(
            "a control has no image and its condition no map; give --control FOLDER=IMAGE.png, or "
            "--map MAP.png"
        )
    if isinstance(found, LabelMap) and control.labels is not None:
        check_labels(found, control.labels, "the control reads")
    return found


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
    loaded = tuple(_loaded(control, denoiser) for control in several)
    check_further(loaded, denoiser)
    view.controls = Controls(loaded, denoiser)
    return view


def _loaded(control: Control, denoiser: Denoiser) -> Control:
    """The control with its network, where it was given by name; it fits the denoiser."""
    if isinstance(control.model, str | Path):
        model = load_control(control.model, denoiser.device, denoiser.model.dtype)
        labels = control.labels or control_labels(control.model)
        control = replace(control, model=model, labels=labels)
    if not isinstance(control.model, tuple(KINDS.values())):
        raise GuidekitError(
            f"a control's model is a {', '.join(KINDS)} or a folder, not "
            f"{type(control.model).__name__}"
        )
    if isinstance(control.model, ControlNetModel):
        check_net(control.model, denoiser)
    if isinstance(control.model, MapEncoder | SegmentMap):
        check_widths(control.model, denoiser)
    return control
