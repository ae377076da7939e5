"""One guided step of a tiny pipeline, and energies that keep their gradients."""

from dataclasses import dataclass

from guidekit import Condition, Guidance, Sampling, Segment, box_mask

SEGMENTS = (
    Segment("red circle", box_mask((0, 0, 0.5, 1))),
    Segment("blue", box_mask((0.5, 0.5, 1, 1)), strength=0.5),
)
RED = Condition("a red circle and a blue square", segments=SEGMENTS)


@dataclass(kw_only=True)
class Keep(Guidance):
    """Keeps the energy and the gradient of each step."""

    def push(self, step, grad):
        self.grad = grad
        return super().push(step, grad)


@dataclass(kw_only=True)
class Bright(Keep):
    """An energy of the combined x0."""

    def energy(self, step):
        self.value = (step.x0[:, :2] ** 2).flatten(1).mean(1)
        return self.value


@dataclass(kw_only=True)
class Input(Keep):
    """An energy of z alone."""

    graph = "input"

    def energy(self, step):
        self.value = (step.z**2).flatten(1).mean(1)
        return self.value


def engine_at(pipe, guidances, seeds=(0, 1), cfg=4.0, steps=4, **options):
    """An engine with the first z and timestep of a run."""
    sampling = Sampling(pipe, RED, guidances, seeds=seeds, steps=steps, cfg=cfg, **options)
    z, timestep = sampling._start(), sampling.run.scheduler.timesteps[0]
    return sampling.engine, z, timestep


def predict(pipe, guidances, **options):
    engine, z, timestep = engine_at(pipe, guidances, **options)
    return engine, engine.predict(z, timestep, 0, 4)
