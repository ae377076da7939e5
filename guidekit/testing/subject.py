"""What a conformance check works on: a guidance's example, images, a tiny pipeline, its state."""

import dataclasses
import inspect
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from guidekit.backbones.controls import Control
from guidekit.backbones.denoiser import Denoiser
from guidekit.conditions import Condition
from guidekit.engine.engine import lack
from guidekit.guidance import Guidance
from guidekit.sampler import Sampling
from guidekit.testing import conditioners, miniatures

STEPS, SEEDS, CFG = 3, (5, 6), 5.0
LABELS = (3, 207)  # for models of classes
CONTROL = "control"  # the family of Stable Diffusion with a ControlNet beside it


class Subject:
    """A guidance class, its example on two images, and a family's tiny pipeline to draw them."""

    def __init__(self, cls: type[Guidance], family: str = "sd"):
        self.cls, self.family = cls, family

    def build(self) -> DiffusionPipeline:
        """A new pipeline of the family."""
        family = "sd" if self.family == CONTROL else self.family
        return getattr(miniatures, f"{family}_pipeline")()

    def controls(self, pipe: DiffusionPipeline) -> list[Control]:
        """The control beside the pipeline, in its type; none in other families."""
        if self.family != CONTROL:
            return []
        net = conditioners.control_net(pipe)
        net = net if net.dtype == pipe.unet.dtype else net.to(pipe.unet.dtype)
        return [Control(net, Image.radial_gradient("L").resize((32, 32)), scale=0.5)]

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """A pipeline of this check's own: a guidance that spoils it spoils no other check."""
        return self.build()

    @cached_property
    def conditions(self) -> list[Condition]:
        """The class's example and another one, so that mixing up images shows.

        Models without text get two classes, and what else the example condition has.
        """
        first = self.cls.example_condition()
        if not Denoiser(self.pipe).reads_text:
            return [Condition(label=label, image=first.image) for label in LABELS]
        mirrored = [dataclasses.replace(s, mask=s.mask.flip(-1)) for s in first.segments]
        return [
            first,
            dataclasses.replace(first, prompt=f"{first.prompt} and blue", segments=tuple(mirrored)),
        ]

    def example(self, **changes: Any) -> Guidance:
        """The class's example with some fields changed."""
        return dataclasses.replace(self.cls.example(), **changes)

    def sampling(
        self,
        *guidances: Guidance,
        images: tuple[int, ...] = (0, 1),
        pipe=None,
        steps: int = STEPS,
        particles: int | None = None,
    ) -> Sampling:
        """A short run, not yet begun; two particles an image for methods that act in groups."""
        count = self.particles if particles is None else particles
        images = tuple(i for i in images for _ in range(count))
        conditions = [self.conditions[i] for i in images]
        if not any(g.reads_image for g in guidances):  # an image that nothing reads is refused
            conditions = [dataclasses.replace(c, image=None) for c in conditions]
        pipe = pipe or self.pipe
        return Sampling(
            pipe,
            conditions,
            guidances,
            seeds=[SEEDS[i] + 10 * (n % count) for n, i in enumerate(images)],
            steps=steps,
            cfg=CFG,
            # Copies of a particle part by noise.
            eta=float(count > 1 and "eta" in inspect.signature(pipe.scheduler.step).parameters),
            particles=count,
            controls=self.controls(pipe),
        )

    @property
    def particles(self) -> int:
        """Images of each group: two where the method acts in groups."""
        return 2 if self.cls.grouped or self.cls.overrides("resample") else 1

    @cached_property
    def plain(self) -> Sampling:
        """The finished run without guidance."""
        return self.sampling().finish()

    def refusal(self) -> str | None:
        """Why the example refuses the family, where the class declares that it needs more.

        Raises AssertionError for a need that is not there and is not refused either.
        """
        if lack(self.cls.example(), Denoiser(self.pipe)) is None:
            return None
        try:
            self.sampling(self.example())
        except ValueError as error:
            return str(error)
        raise AssertionError(f"it does not refuse {self.family}, which has not all that it needs")


def state(pipe: DiffusionPipeline) -> dict[str, Any]:
    """All that a run could leave behind: weights, flags, hooks, wrapped methods, processors."""
    found = {}
    for part, model in pipe.components.items():
        if not isinstance(model, nn.Module):
            continue
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if key not in ("_parameters", "_buffers", "_modules"):
                    found[f"{part}.{name}.{key}"] = _frozen(value)
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            found[f"{part}.{name}"] = weight.detach().clone()
            found[f"{part}.{name} requires_grad"] = weight.requires_grad
            found[f"{part}.{name} has a gradient"] = weight.grad is not None
    return found


def _frozen(value: Any) -> Any:
    """What tells two states of an attribute apart."""
    if isinstance(value, dict):  # hooks
        return tuple((key, id(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def same(before: dict[str, Any], after: dict[str, Any], when: str) -> None:
    """Raises AssertionError that names the first things that differ."""
    changed = [
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or not _equal(before[key], after[key])
    ]
    assert not changed, f"{when} the pipeline differs in {', '.join(sorted(changed)[:3])}"


def _equal(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two
