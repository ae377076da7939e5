"""What the user wants in one picture: a prompt, and phrases of it with masks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.references import Reference


@dataclass(frozen=True)
class Segment:
    """A phrase of the prompt and the place where it should appear.

    mask: `(H, W)` in [0, 1], any size, soft edges allowed; it is resized with the picture.
    strength: factor on what a guidance does for this segment.
    prompt, negative: texts of the region for methods that denoise it by itself (MultiDiffusion);
    the default prompt is the phrase.

    Raises GuidekitError for an empty phrase and for a mask that is empty, not finite, outside [0,
    1] or not two-dimensional.
    """

    phrase: str
    mask: Tensor
    strength: float = 1.0
    prompt: str | None = None
    negative: str = ""
    box: tuple[float, ...] | None = None  # where the mask came from, if from a box

    def __post_init__(self):
        where = f"segment {self.phrase!r}"
        if not self.phrase.strip():
            raise GuidekitError("a segment has an empty phrase; name words of the prompt")
        if self.mask.ndim != 2:
            raise GuidekitError(f"{where}: a mask is (H, W), this one is {tuple(self.mask.shape)}")
        if not torch.isfinite(self.mask).all():
            raise GuidekitError(f"{where}: the mask holds NaN or infinity; use values from 0 to 1")
        if self.mask.min() < 0 or self.mask.max() > 1:
            raise GuidekitError(
                f"{where}: mask values lie from 0 to 1, these reach {_range(self.mask)}"
            )
        if self.mask.max() == 0:
            raise GuidekitError(f"{where}: the mask is empty; mark at least one pixel")
        if not np.isfinite(self.strength):
            raise GuidekitError(f"{where}: the strength must be finite, not {self.strength}")


@dataclass(frozen=True)
class Condition:
    """Everything asked of one picture."""

    prompt: str = ""
    negative: str = ""
    segments: tuple[Segment, ...] = field(default=())
    label: int | None = None  # of models that are conditioned on classes
    image: Reference | None = None  # a picture to follow

    @property
    def content(self) -> str | int:
        """What the picture is of: its class where it has one, else its prompt."""
        return self.prompt if self.label is None else self.label


Layouts = Sequence[Segment] | Condition | Sequence[Condition | Sequence[Segment]]


def spread_layouts(given: Layouts, prompts: int, count: int) -> list[Condition]:
    """One layout for each of `count` pictures of every prompt, in the order of diffusers' batches.

    given: segments or a Condition for all, or a list with one entry per prompt or per picture.
    Raises GuidekitError for a list of another length.
    """
    if isinstance(given, Condition) or all(isinstance(s, Segment) for s in given):
        return [_layout(given)] * (prompts * count)
    if len(given) == prompts:
        return [_layout(g) for g in given for _ in range(count)]
    if len(given) == prompts * count:
        return [_layout(g) for g in given]
    raise GuidekitError(
        f"{len(given)} layouts for {prompts} prompts with {count} pictures each; give one for all, "
        "one per prompt or one per picture"
    )


def _layout(given: Condition | Sequence[Segment]) -> Condition:
    return given if isinstance(given, Condition) else Condition(segments=tuple(given))


def with_prompts(layout: Condition, prompt: str, negative: str) -> Condition:
    """The layout under these prompts; ValueError if it names others, but for case and spaces."""
    for own, called in ((layout.prompt, prompt), (layout.negative, negative)):
        if own and own.lower().split() != called.lower().split():
            raise GuidekitError(f"the layout's prompt is {own!r}, that of the call is {called!r}")
    return replace(layout, prompt=prompt, negative=negative)


def _range(x: Tensor) -> str:
    return f"{float(x.min()):g} to {float(x.max()):g}"


def box_mask(box: tuple[float, float, float, float], size: int = 256) -> Tensor:
    """Mask `(size, size)` of the box left, top, right, bottom in fractions of the picture.

    Pixels that the box cuts get the share that it covers. Raises GuidekitError for a box that is
    inverted, empty or outside the picture.
    """
    left, top, right, bottom = box
    if not all(np.isfinite(box)) or not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise GuidekitError(
            f"box {','.join(f'{b:g}' for b in box)}: give left,top,right,bottom as fractions with "
            "0 <= left < right <= 1 and 0 <= top < bottom <= 1"
        )
    edges = torch.arange(size + 1, dtype=torch.float64) / size

    def cover(low: float, high: float) -> Tensor:
        return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * size

    return (cover(top, bottom)[:, None] * cover(left, right)[None]).float()


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Mask `(H, W)` to `(height, width)`: the mean over each target pixel (soft targets, R8)."""
    return F.interpolate(mask[None, None].float(), (height, width), mode="area")[0, 0]


def segment_masks(conditions: list[Condition], height: int, width: int) -> Tensor:
    """Masks `(B, S, height, width)`; pictures with fewer than S segments end in empty masks."""
    most = max(len(c.segments) for c in conditions)
    masks = torch.zeros(len(conditions), most, height, width)
    for b, condition in enumerate(conditions):
        for s, segment in enumerate(condition.segments):
            masks[b, s] = resize_mask(segment.mask, height, width)
    return masks


def segment_strengths(conditions: list[Condition]) -> Tensor:
    """Strengths `(B, S)`, 0 where a picture has no such segment."""
    most = max(len(c.segments) for c in conditions)
    rows = [[s.strength for s in c.segments] for c in conditions]
    return torch.tensor([row + [0.0] * (most - len(row)) for row in rows]).reshape(-1, most)


def require_segments(conditions: list[Condition], who: str) -> None:
    """Raises GuidekitError unless every picture has a segment."""
    if not all(condition.segments for condition in conditions):
        raise GuidekitError(
            f"{who} needs segments: give --segment PHRASE=MASK.png, --segment "
            "PHRASE=left,top,right,bottom or --layout layout.json"
        )
