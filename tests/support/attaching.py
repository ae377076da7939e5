"""Guidances to attach, and the images of the own loop to compare with."""

from dataclasses import dataclass
from typing import ClassVar

from guidekit import Condition, Guidance, Segment, box_mask, sample

SEGMENTS = (Segment("red circle", box_mask((0, 0, 0.5, 1))),)
RED = Condition("a red circle", "blue", SEGMENTS)


def own_loop(pipe, guidances, conditions=RED, seeds=(5, 6), **options):
    given = {"seeds": seeds, "steps": 3, "cfg": 5.0, "height": 32, "width": 48}
    return sample(pipe, conditions, guidances, **given | options).finish().images


@dataclass(kw_only=True)
class Bright(Guidance):
    """Pulls the first channel of the decoded x0 up, and draws noise."""

    scale: float = 5.0

    def energy(self, step):
        step.noise("bright")
        return -step.decode(step.x0)[:, 0].mean((1, 2))

    @property
    def rule(self):
        return (id(self),)

    def push(self, step, grad):
        return step.move.shift(-self.scale * grad)


@dataclass(kw_only=True)
class Watch(Guidance):
    """Changes nothing and keeps the steps: the replayed calls must be the pipeline's own."""

    kept: ClassVar[list] = []

    def edit_prediction(self, step, out):
        self.kept.append(step)
        return out
