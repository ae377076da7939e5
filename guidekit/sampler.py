"""The sampling loop, a generator of steps over any known diffusers scheduler.

Without guidances it makes the same calls as the bare diffusers pipeline and the same images, bit
for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from guidekit.account import Account
from guidekit.backbones.compiled import as_backend, compiled
from guidekit.backbones.controls import Control
from guidekit.backbones.denoiser import Denoiser, frozen
from guidekit.backbones.residuals import with_controls
from guidekit.backbones.safety import checked
from guidekit.conditions import Condition
from guidekit.engine.engine import Engine
from guidekit.engine.recurrence import Recurrence
from guidekit.engine.solution import solved, solver_of
from guidekit.errors import GuidekitError, blame
from guidekit.groups import with_particles
from guidekit.guidance import Guidance
from guidekit.inputs.checks import (
    check_images,
    check_maps,
    check_numbers,
    check_scheduler,
    check_targets,
    step_arguments,
)
from guidekit.inputs.given import as_conditions, as_denoiser, as_guidances, as_scheduler, tuned
from guidekit.inputs.start import Start, own_copy
from guidekit.levels import Levels
from guidekit.outputs.saved import Drawn
from guidekit.run import Run
from guidekit.seeds import Seeds
from guidekit.step import Step

STEPS = 50  # where neither the user nor the model says
Asked = Condition | str | int  # what says a condition: a text is a prompt, a number a class


class Sampling(Drawn):
    """One batch of images being drawn: iterate over its steps, then read `images`.

    denoiser: a Denoiser, a live pipeline or a model's name. conditions: one for all images or one
    per seed; a text is a prompt, a number a class. guidances: objects or plugins' names. seeds: one
    image each, a number, several or a text such as 0-7; an image depends on its batch by rounding.
    steps, cfg and options of guidances that are not given are those tuned for a built-in model.
    cfg: diffusers' guidance scale, 1 for none, default the family's (1 without a condition).
    embedded_cfg: the scale that distilled models take as an input (Flux), default the pipeline's.
    eta: DDIM's noise. scheduler: an instance to copy or a name, by default the pipeline's.
    timesteps or sigmas: the levels to go through, in place of steps. latents: in place of the first
    noise; image and strength: an image to begin with, see `guidekit.inputs.start.Start`.
    memory: "fast", or "low" for gradient checkpointing. nonfinite: "raise" or "zero" for gradients
    that are not finite. attention: eager | sdpa | triton | xformers. compile: True, or a backend's
    name, for a denoiser that torch.compile compiles while the run is drawn, and that is afterwards
    as it was.
    calls: how branches with and without a graph ride, "batched" or "split" by kind of call or for
    all ("*"), for a replay bit for bit (`account.calls`); by default what is faster. particles:
    images of so many seeds, one after the other, are a group (`Condition.group`), in which they may
    see each other. controls: ControlNets and T2I-Adapters beside the denoiser.

    Raises GuidekitError for settings that cannot work, before anything is computed.
    """

    def __init__(
        self,
        denoiser: Denoiser | DiffusionPipeline | str,
        conditions: Asked | Sequence[Asked],
        guidances: Guidance | str | Sequence[Guidance | str] = (),
        *,
        seeds: int | str | Iterable[int] = (0,),
        steps: int | None = None,
        cfg: float | None = None,
        embedded_cfg: float | None = None,
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        scheduler: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        latents: Tensor | None = None,
        image: Any = None,
        strength: float | None = None,
        memory: str = "fast",
        nonfinite: str = "raise",
        attention: str | None = None,
        compile: bool | str = False,
        calls: dict[str, str] | None = None,
        particles: int = 1,
        controls: Control | Sequence[Control] = (),
    ):
        self._backend = as_backend(compile)
        denoiser = with_controls(as_denoiser(denoiser), controls)
        asked = as_guidances(guidances, denoiser.pipeline)
        self.start = Start(timesteps, sigmas, latents, image, strength)
        self.denoiser, self.steps, cfg = _settled(denoiser, self.start, steps, cfg, embedded_cfg)
        check_numbers(self.steps, cfg=cfg, eta=eta, embedded_cfg=embedded_cfg or 0.0)
        self.seeds = list(Seeds(seeds))
        self.conditions = self._prepared(conditions, particles, cfg)
        shape = self.denoiser.latent_shape(height, width)
        scheduler, first = self._laid_out(scheduler, shape)
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        step_kwargs = step_arguments(scheduler, eta, self.generators)
        self.run = Run(
            self.denoiser,
            self.conditions,
            self.seeds,
            shape,
            scheduler,
            cfg=cfg,
            memory=memory,
            nonfinite=nonfinite,
            attention=attention,
            step_kwargs=step_kwargs,
            levels=Levels(scheduler, step_kwargs, first),
            calls=calls,
        )
        self.engine = self._engine(asked)
        self.guidances = self.engine.guidances  # the run's own copies
        self._begins = self._who_begins()
        self._drawn = False
        self._again = Recurrence(self.run, self.guidances)
        #: Which ones the pipeline's safety checker blackened; None without one.
        self.black: list[bool] | None = None

    def _prepared(
        self, conditions: Asked | Sequence[Asked], particles: int, cfg: float
    ) -> list[Condition]:
        """A condition for every image, in groups, as the denoiser takes them."""
        asked = with_particles(as_conditions(conditions, len(self.seeds)), particles)
        prepared = [self.denoiser.prepared(condition) for condition in asked]
        self.denoiser.check_own_loop()
        self.denoiser.check_cfg(cfg)
        self.denoiser.check(prepared)
        return prepared

    def _laid_out(self, scheduler: Any, shape: tuple[int, int, int]) -> tuple[Any, int]:
        """A scheduler with the steps of this run, and the index of its first timestep.

        Schedulers keep state from step to step; this run has its own, with the same tables.
        """
        pipeline = self.denoiser.pipeline
        scheduler = as_scheduler(scheduler, pipeline)
        check_scheduler(scheduler, pipeline.scheduler, self.steps)
        own = own_copy(scheduler)
        self.start.check(self.denoiser, shape, len(self.seeds))
        return own, self.start.lay_out(self.denoiser, own, self.steps, shape)

    def _engine(self, guidances: Sequence[Guidance]) -> Engine:
        """The engine with copies of the guidances that have something to do."""
        check_images(self.denoiser, self.conditions, guidances)
        check_maps(self.denoiser, self.conditions)
        check_targets(self.conditions, guidances)
        # One of scale 0 may still reject finished images; it acts at no step.
        used = [g for g in guidances if g.scale != 0 or g.rejects]
        with frozen(*self.denoiser.models):
            return Engine(self.run, used)

    @property
    def account(self) -> Account:
        """What every guidance did."""
        return self.run.account

    def finish(self, progress: Callable[[Step], None] | None = None) -> "Sampling":
        """Draws to the end and returns itself; `progress` is called after every step.

        A run is drawn once: raises GuidekitError for one that was begun before.
        """
        for step in self:
            if progress:
                progress(step)
        return self

    def __iter__(self) -> Iterator[Step]:
        """Yields every step after its prediction was made; the last one holds the images.

        Several runs may share a model, also in threads: each denoiser call is shown to the run
        that made it. Raises GuidekitError for a run that was begun before.
        """
        run = self.run
        timesteps = list(run.scheduler.timesteps[run.levels.start :])
        if self._drawn:
            raise GuidekitError(
                "this run was begun already, and its generators and scheduler have moved on; call "
                "guidekit.sample again for another"
            )
        self._drawn = True
        network, models = self.denoiser.network, self.denoiser.models
        with frozen(*models), compiled(network, self._backend), self.engine.opened():
            solver, z = solver_of(self.guidances, run.levels, run.scheduler), self._start()
            if solver is None:
                yield from self._walked(z, timesteps)
            else:
                yield from self._ended(solved(self.engine, solver, z, timesteps))

    def _walked(self, z: Tensor, timesteps: list[Tensor]) -> Iterator[Step]:
        """The steps of the scheduler, from its first level to its last."""
        place, path = 0, self.run.levels.steps
        while place < len(path):
            back = 0
            for step, z in self._advance(z, place, timesteps):  # noqa: B020
                if step.index == path[place][-1]:
                    back = self.engine.jumps(step, place + 1)
                if step.index == len(timesteps) - 1 and not back:
                    self._decode(step, z)
                yield step
            if back:
                z = self._again.back(z, place + 1 - back, place)
            place += 1 - back

    def _ended(self, solution: Iterator[tuple[Step, Tensor]]) -> Iterator[Step]:
        """The steps of a guidance's own loop, of which the last holds the images."""
        latest: tuple[Step, Tensor] | None = None
        for following in solution:
            if latest is not None:
                yield latest[0]
            latest = following
        if latest is None:
            raise GuidekitError("a solver drew nothing; yield a step and z at least once")
        self._decode(*latest)
        yield latest[0]

    def _decode(self, step: Step, z: Tensor) -> None:
        """Keeps what the run has drawn."""
        self._latents = z
        images, self.black = checked(self.denoiser, self.denoiser.decode(z))
        self._images = step.images = images
        self.engine.close()

    def _start(self) -> Tensor:
        """The first z of every image, at the run's first level."""
        run = self.run
        timestep = run.scheduler.timesteps[run.levels.start]
        shape, generators = run.latent_shape, self.generators
        run.first = self.start.first(self.denoiser, run.scheduler, timestep, shape, generators)
        if self._begins is None:
            return run.first
        with blame(name := self._begins.name, "begin"):
            z = self._begins.begin(run)
        return run.first if z is None else self._begun(z, name)

    def _who_begins(self) -> Guidance | None:
        """The guidance that says how the run begins; GuidekitError for two that would."""
        begins = [g for g in self.guidances if g.scale != 0 and g.overrides("begin")]
        names = [g.name for g in begins] + ["latents or image"] * self.start.given
        if begins and len(names) > 1:
            raise GuidekitError(f"{' and '.join(names)} both say how the run begins; leave one out")
        return begins[0] if begins else None

    def _begun(self, z: Tensor, name: str) -> Tensor:
        """The z that a guidance begins with; GuidekitError for one of another shape."""
        shape = (len(self.seeds), *self.run.latent_shape)
        if z.shape != shape:
            raise GuidekitError(f"{name} begins with {tuple(z.shape)}; this run has {shape}")
        self.run.account.edit(name)
        return z.to(self.run.device, self.denoiser.dtype)

    def _advance(
        self, z: Tensor, place: int, timesteps: list[Tensor]
    ) -> Iterator[tuple[Step, Tensor]]:
        """One step of the solver, done as often as a guidance asks for at its first call.

        Yields the calls of the last time, each with the next z.
        """
        calls, done, times, n = self.run.levels.steps[place], 0, 1, len(timesteps)
        while done < times:
            repeat = self._again.enter(place)
            for index in calls:
                step = self.engine.predict(z, timesteps[index], index, n, repeat)
                if index == calls[0] and done == 0:
                    times = self.engine.repeats(step)
                z = self.engine.resample(
                    step, self._scheduler_step(step), self._again.kept.values()
                )
                z = self.engine.edit_sample(step, z)
                if done + 1 == times:
                    yield step, z
            done += 1
            if done < times:
                z = self._again.back(z, place, place)

    def _scheduler_step(self, step: Step) -> Tensor:
        """The scheduler's own step on the guided prediction, from the refined z."""
        out = cast(Tensor, step.prediction)
        if step.variance is not None:
            out = torch.cat([out, step.variance.to(out.dtype)], 1)
        with torch.no_grad():
            stepped: tuple[Tensor, ...] = self.run.scheduler.step(
                out, step.timestep, step.z, **self.run.step_kwargs, return_dict=False
            )
        return stepped[0]


def _settled(
    denoiser: Denoiser,
    start: Start,
    steps: int | None,
    cfg: float | None,
    embedded_cfg: float | None,
) -> tuple[Denoiser, int, float]:
    """The denoiser, steps and guidance scale: given, tuned for the model, or the family's own."""
    own, steps = tuned(denoiser.pipeline), start.count(steps)
    if embedded_cfg is not None:
        denoiser = denoiser.with_embedded_cfg(embedded_cfg)
    steps = own.get("steps", STEPS) if steps is None else steps
    cfg = own.get("cfg") if cfg is None else cfg
    return denoiser, steps, denoiser.cfg if cfg is None else cfg


def accepted(guidances: Sequence[Guidance], images: Tensor) -> Tensor:
    """Which images (B, 3, H, W) every guidance accepts: (B,) bool."""
    kept = torch.ones(len(images), dtype=torch.bool)
    for guidance in guidances:
        kept &= guidance.accept(images).cpu()
    return kept
