"""What the user wants in one image: a prompt, and phrases of it with masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from guidekit.errors import GuidekitError
from guidekit.labels import LabelMap
from guidekit.masks import Box, as_mask, resize_mask, size_of
from guidekit.references import Reference, as_reference

ALIKE = 0.05  # most that two shapes differ by where nobody sees it


@dataclass(frozen=True)
class Segment:
    """A phrase of the prompt and the place where it should appear.

    mask: `(H, W)` in [0, 1], any size, soft edges allowed, stretched over the drawing; also given
    as an array, an image, the path of one (see `masks`), or a box (left, top, right, bottom) in
    fractions.
    strength: factor on what a guidance does for this segment.
    prompt, negative: texts of the region for methods that denoise it by itself (MultiDiffusion);
    the default prompt is the phrase.
    occurrence: which place of the phrase in the prompt is meant, from 1; by default all, or the
    n-th for the n-th segment with this phrase. tokens: the columns of the text by hand, in place of
    looking the phrase up.

    Raises GuidekitError for an empty phrase, impossible tokens or occurrence, and for a mask that
    is empty, not finite, outside [0, 1] or not two-dimensional.
    """

    phrase: str
    mask: Tensor
    strength: float = 1.0
    prompt: str | None = None
    negative: str = ""
    box: Box | None = None  # where the mask came from, if from a box
    size: tuple[int, int] | None = None  # width and height of the image that the mask came from
    tokens: tuple[int, ...] | None = None
    occurrence: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.phrase, str):
            raise GuidekitError(f"a segment's phrase is a text, not {type(self.phrase).__name__}")
        where = f"segment {self.phrase!r}"
        if not self.phrase.strip():
            raise GuidekitError("a segment has an empty phrase; name words of the prompt")
        self._read_mask(where)
        if self.mask.ndim != 2 or not self.mask.numel():
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
        self._check_tokens(where)

    def _read_mask(self, where: str) -> None:
        """Puts the mask, its box and the size of its image in place of what was given."""
        given = self.mask
        try:
            mask, box = as_mask(given)
        except ValueError as error:
            raise GuidekitError(f"{where}: {error}") from None
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "box", box if self.box is None else self.box)
        if isinstance(given, str | Path | Image.Image):
            object.__setattr__(self, "size", size_of(mask))

    def _check_tokens(self, where: str) -> None:
        """Raises GuidekitError for tokens or an occurrence that cannot be."""
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(self.tokens))
            if not self.tokens or not all(_whole(token, 0) for token in self.tokens):
                raise GuidekitError(
                    f"{where}: tokens are columns of the text, whole numbers from 0, not "
                    f"{self.tokens}"
                )
        if self.occurrence is None:
            return
        if not _whole(self.occurrence, 1):
            raise GuidekitError(
                f"{where}: occurrence is a whole number from 1, not {self.occurrence!r}"
            )
        if self.tokens is not None:
            raise GuidekitError(f"{where}: give occurrence or tokens, not both")


def _whole(value: object, least: int) -> bool:
    """Whether it is a whole number of at least so much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Condition:
    """Everything asked of one image."""

    prompt: str = ""
    negative: str = ""
    segments: tuple[Segment, ...] = field(default=())
    label: int | None = None  # of models that are conditioned on classes
    image: Reference | None = None  # an image to follow; also given as one of PIL, or a path
    map: LabelMap | None = None  # the class of every pixel, for controls and models of maps
    # What guidances are to reach in this image, by their names: for fewshot a class's number or
    # name, or a mask of class numbers. It goes with the image through batches and retries.
    targets: Mapping[str, Any] = field(default_factory=dict, compare=False)
    # Images of one group may see each other (particles, shared attention); None is its own.
    group: str | int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative"):
            if not isinstance(value := getattr(self, name), str):
                raise GuidekitError(f"a condition's {name} is a text, not {type(value).__name__}")
        if self.label is not None and (
            isinstance(self.label, bool) or not isinstance(self.label, int)
        ):
            raise GuidekitError(f"a condition's label is a whole number, not {self.label!r}")
        segments = (self.segments,) if isinstance(self.segments, Segment) else self.segments
        for segment in segments:
            if not isinstance(segment, Segment):
                raise GuidekitError(
                    "a condition's segments are guidekit.Segment(phrase, mask), not "
                    f"{type(segment).__name__}"
                )
        object.__setattr__(self, "segments", tuple(segments))
        if not isinstance(self.map, LabelMap | None):
            raise GuidekitError(
                f"a condition's map is a guidekit.LabelMap, not {type(self.map).__name__}"
            )
        if self.image is not None:
            object.__setattr__(self, "image", as_reference(self.image))

    @property
    def content(self) -> str | int:
        """What the image is of: its class where it has one, else its prompt."""
        return self.prompt if self.label is None else self.label


Layouts = Sequence[Segment] | Condition | Sequence[Condition | Sequence[Segment]]


def spread_layouts(given: Layouts, prompts: int, count: int) -> list[Condition]:
    """One layout for each of `count` images of every prompt, in the order of diffusers' batches.

    given: segments or a Condition for all, or a list with one entry per prompt or per image.
    Raises GuidekitError for a list of another length.
    """
    if isinstance(given, Condition) or all(isinstance(s, Segment) for s in given):
        return [_layout(given)] * (prompts * count)
    if len(given) == prompts:
        return [_layout(g) for g in given for _ in range(count)]
    if len(given) == prompts * count:
        return [_layout(g) for g in given]
    raise GuidekitError(
        f"{len(given)} layouts for {prompts} prompts with {count} images each; give one for all, "
        "one per prompt or one per image"
    )


def _layout(given: Any) -> Condition:
    return given if isinstance(given, Condition) else Condition(segments=tuple(given))


def with_prompts(layout: Condition, prompt: str, negative: str) -> Condition:
    """The layout under these prompts; ValueError if it names others, but for case and spaces."""
    for own, called in ((layout.prompt, prompt), (layout.negative, negative)):
        if own and own.lower().split() != called.lower().split():
            raise GuidekitError(f"the layout's prompt is {own!r}, that of the call is {called!r}")
    return replace(layout, prompt=prompt, negative=negative)


def _range(x: Tensor) -> str:
    return f"{float(x.min()):g} to {float(x.max()):g}"


def segment_masks(conditions: list[Condition], height: int, width: int) -> Tensor:
    """Masks `(B, S, height, width)`; images with fewer than S segments end in empty masks."""
    most = max(len(c.segments) for c in conditions)
    masks = torch.zeros(len(conditions), most, height, width)
    for b, condition in enumerate(conditions):
        for s, segment in enumerate(condition.segments):
            masks[b, s] = resize_mask(segment.mask, height, width)
    return masks


def segment_strengths(conditions: list[Condition]) -> Tensor:
    """Strengths `(B, S)`, 0 where an image has no such segment."""
    most = max(len(c.segments) for c in conditions)
    rows = [[s.strength for s in c.segments] for c in conditions]
    return torch.tensor([row + [0.0] * (most - len(row)) for row in rows]).reshape(-1, most)


def stretched(conditions: Sequence[Condition], size: tuple[int, int]) -> list[str]:
    """Remarks on masks from images that have another shape than the drawing's `size` (H, W)."""
    height, width = size
    return [
        f"segment {s.phrase!r}: its mask is {s.size[0]}x{s.size[1]} and the drawing {width}x"
        f"{height}; it is stretched to that shape"
        for condition in conditions
        for s in condition.segments
        if s.size and abs(s.size[0] * height / (s.size[1] * width) - 1) > ALIKE
    ]


def require_segments(conditions: list[Condition], who: str) -> None:
    """Raises GuidekitError unless every image has a segment."""
    if not all(condition.segments for condition in conditions):
        raise GuidekitError(
            f"{who} needs segments: give --segment PHRASE=MASK.png, --segment "
            "PHRASE=left,top,right,bottom or --layout layout.json; in Python "
            "segments=[Segment(PHRASE, MASK)]"
        )
