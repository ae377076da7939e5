"""Rows never mix: in float64, on the built-in models, at a plugin's own defaults.

In float32 roundings differ between a batch and an image alone, and a guidance whose steps have one
length against a gradient that changes from step to step makes them grow: such images are not the
same, and nothing is wrong. In float64 what grows begins so small that whatever is left is mixing.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch
from diffusers import DiffusionPipeline

from guidekit.backbones.denoiser import Denoiser
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.inputs.given import load
from guidekit.references import load_reference
from guidekit.sampler import Sampling
from guidekit.testing.subject import SEEDS, Subject

MODELS = ("scenes", "scenes-ddpm", "scenes-semantica")
#: Enough that all windows begin; each step of the gradient methods is as long as in a run of 50.
STEPS = 8
LARGEST = 1e-6  # difference of images in [0, 1] and of latents


class BuiltIn(Subject):
    """A guidance class on a built-in model in float64, with the model's own settings."""

    def build(self) -> DiffusionPipeline:
        """The model, from its file."""
        return load(self.family, "cpu", torch.float64)

    @cached_property
    def conditions(self) -> list[Condition]:
        """Two that differ, of what the model reads."""
        denoiser = Denoiser(self.pipe)
        if denoiser.reads_image:
            return [Condition(image=load_reference(f"scene-{i}")) for i in (3, 4)]
        return super().conditions if denoiser.reads_text else [Condition()] * 2

    def sampling(self, *guidances: Guidance, images: tuple[int, ...] = (0, 1)) -> Sampling:
        """A short run, not yet begun; what is not given is the model's own."""
        conditions = [self.conditions[i] for i in images]
        if not Denoiser(self.pipe).reads_image and not any(g.reads_image for g in guidances):
            conditions = [replace(c, image=None) for c in conditions]
        seeds = [SEEDS[i] for i in images]
        return Sampling(self.pipe, conditions, guidances, seeds=seeds, steps=STEPS)

    def refusal(self) -> None:
        """None: each instance is asked by itself, as they may need different things."""

    def instances(self) -> Iterator[Guidance]:
        """One with all defaults, then the example, which has what the defaults lack.

        A start that is searched for takes minutes at the defaults: there it is the example alone.
        """
        if not self.cls.overrides("begin"):
            yield self.cls()
        yield self.cls.example()


def rows(subject: BuiltIn) -> str | None:
    """An image drawn in a batch of two is the same alone, to 1e-6 in float64.

    Of the defaults, or of the example where those do nothing or need more.
    """
    refused = ""
    for guidance in subject.instances():
        try:
            both = subject.sampling(guidance)
        except GuidekitError as error:
            refused = str(error)
            continue
        if both.finish().account.acted(guidance.name):
            return _compared(subject, guidance, both)
    return refused or "it does nothing on this model"


def _compared(subject: BuiltIn, guidance: Guidance, both: Sampling) -> None:
    """Raises AssertionError where an image of the batch is not the one that is drawn alone."""
    for i in range(len(SEEDS)):
        alone = subject.sampling(guidance, images=(i,)).finish()
        for kind in ("images", "latents"):
            gap = float((getattr(alone, kind)[0] - getattr(both, kind)[i]).abs().max())
            assert gap < LARGEST, f"{kind} of image {i} differ by {gap:.2g} from those alone"
