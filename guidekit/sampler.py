"""The sampling loop, a generator of steps over any known diffusers scheduler.

Without guidances it makes the same calls as the bare diffusers pipeline and the same images, bit
for bit.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from guidekit.account import Account
from guidekit.backbones.compiled import as_backend, compiled
from guidekit.backbones.denoiser import Denoiser, frozen
from guidekit.conditions import Condition
from guidekit.engine.engine import Engine
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.inputs import as_conditions, as_denoiser, as_guidances, as_scheduler, tuned
from guidekit.levels import Levels
from guidekit.noise import is_flow
from guidekit.run import Run
from guidekit.seeds import Seeds, derived_seed
from guidekit.start import Start, own_copy
from guidekit.step import Step

STEPS = 50  # where neither the user nor the model says


class Sampling:
    """One batch of images being drawn: iterate over its steps, then read `images`.

    denoiser: a Denoiser, a live pipeline or a model's name. conditions: one for all images or one
    per seed; a text is a prompt, a number a class. guidances: objects or plugins' names. seeds: one
    image each, a number, several or a text such as 0-7; an image depends on its batch by rounding.
    steps, cfg and options of guidances that are not given are those tuned for a built-in model.
    cfg: diffusers' guidance scale, 1 for none, default the family's (1 without a condition).
    embedded_cfg: the scale that distilled models take as an input (Flux), default the pipeline's.
    eta: DDIM's noise. scheduler: an instance to copy or a name, by default the pipeline's.
    timesteps or sigmas: the levels to go through, in place of steps. latents: in place of the first
    noise; image and strength: an image to begin with, see `guidekit.start.Start`. memory: "fast",
    or "low" for gradient checkpointing. nonfinite: "raise" or "zero" for gradients that are not
    finite. attention: eager | sdpa | triton | xformers. compile: True, or a backend's name, for a
    denoiser that torch.compile compiles while the run is drawn, and that is afterwards as it was.
    calls: how branches with and without a graph ride, "batched" or "split" by kind of call, for a
    replay bit for bit (`account.calls`); by default what is faster.

    Raises GuidekitError for settings that cannot work, before anything is computed.
    """

    def __init__(
        self,
        denoiser: Denoiser | DiffusionPipeline | str,
        conditions: Condition | str | int | Sequence[Condition | str | int],
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
    ):
        self._backend = as_backend(compile)
        denoiser = as_denoiser(denoiser)
        own, guidances = (
            tuned(denoiser.pipeline),
            as_guidances(guidances, denoiser.pipeline),
        )
        self.start = Start(timesteps, sigmas, latents, image, strength)
        steps = self.start.count(steps)
        steps = own.get("steps", STEPS) if steps is None else steps
        cfg = own.get("cfg") if cfg is None else cfg
        if embedded_cfg is not None:
            denoiser = denoiser.with_embedded_cfg(embedded_cfg)
        cfg = denoiser.cfg if cfg is None else cfg
        self.denoiser, self.seeds = denoiser, list(Seeds(seeds))
        self.conditions = [denoiser.prepared(c) for c in as_conditions(conditions, len(self.seeds))]
        _check_numbers(steps, cfg=cfg, eta=eta, embedded_cfg=embedded_cfg or 0.0)
        denoiser.check_own_loop()
        denoiser.check_cfg(cfg)
        denoiser.check(self.conditions)
        scheduler = as_scheduler(scheduler, denoiser.pipeline)
        _check_scheduler(scheduler, denoiser.pipeline.scheduler, steps)
        # Schedulers keep state from step to step; this run has its own, with the same tables.
        scheduler = own_copy(scheduler)
        shape = denoiser.latent_shape(height, width)
        self.start.check(denoiser, shape, len(self.seeds))
        first = self.start.lay_out(denoiser, scheduler, steps, shape)
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        step_kwargs = _step_kwargs(scheduler, eta, self.generators)
        self.run = Run(
            denoiser,
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
        # One of scale 0 may still reject finished images; it acts at no step.
        used = [g for g in guidances if g.scale != 0 or g.rejects]
        _check_images(denoiser, self.conditions, guidances)
        _check_targets(self.conditions, guidances)
        with frozen(*denoiser.models):
            self.engine = Engine(self.run, used)
        self.guidances = self.engine.guidances  # the run's own copies
        self._drawn = False
        self.images: Tensor | None = None  # (B, 3, H, W) in [0, 1]
        self.latents: Tensor | None = None  # (B, C, h, w), the last z

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
            z = self._start()
            for calls in run.levels.steps:
                for step, z in self._advance(z, calls, timesteps):  # noqa: B020
                    if step.index == len(timesteps) - 1:
                        self.latents = z
                        self.images = step.images = self.denoiser.decode(z)
                        self.engine.close()
                    yield step

    def _start(self) -> Tensor:
        """The first z of every image, at the run's first level."""
        run = self.run
        found = [(g.name, g.begin(run)) for g in self.engine.guidances]
        if begun := [(name, z) for name, z in found if z is not None]:
            return self._begun(begun)
        timestep = run.scheduler.timesteps[run.levels.start]
        shape, generators = run.latent_shape, self.generators
        return self.start.first(self.denoiser, run.scheduler, timestep, shape, generators)

    def _begun(self, begun: list[tuple[str, Tensor]]) -> Tensor:
        """The z that a guidance begins with; GuidekitError for two, or one of another shape."""
        names = [name for name, _ in begun] + ["latents or image"] * self.start.given
        if len(names) > 1:
            raise GuidekitError(f"{' and '.join(names)} both say how the run begins; leave one out")
        ((_, z),) = begun
        shape = (len(self.seeds), *self.run.latent_shape)
        if z.shape != shape:
            raise GuidekitError(f"{names[0]} begins with {tuple(z.shape)}; this run has {shape}")
        self.run.account.edit(names[0])
        return z.to(self.run.device, self.denoiser.dtype)

    def _advance(
        self, z: Tensor, calls: range, timesteps: list[Tensor]
    ) -> Iterator[tuple[Step, Tensor]]:
        """One step of the solver, done as often as a guidance asks for at its first call.

        Yields the calls of the last time, each with the next z.
        """
        repeat, times, n = 0, 1, len(timesteps)
        while repeat < times:
            before = copy.deepcopy(self.run.scheduler) if self._may_repeat else None
            for index in calls:
                step = self.engine.predict(z, timesteps[index], index, n, repeat)
                if index == calls[0] and repeat == 0:
                    times = self._times(step)
                z = self.engine.edit_sample(step, self._scheduler_step(step, z))
                if repeat + 1 == times:
                    yield step, z
            repeat += 1
            if repeat < times:
                z = self._noise_again(z, calls, repeat)
                self.run.scheduler = before

    def _times(self, step: Step) -> int:
        """How often the solver's step is done that begins with `step`."""
        return self.engine.repeats(step)

    @property
    def _may_repeat(self) -> bool:
        return any(g.overrides("repeats") for g in self.guidances)

    def _scheduler_step(self, step: Step, z: Tensor) -> Tensor:
        """The scheduler's own step on the guided prediction."""
        out = cast(Tensor, step.prediction)
        if step.variance is not None:
            out = torch.cat([out, step.variance.to(out.dtype)], 1)
        with torch.no_grad():
            stepped: tuple[Tensor, ...] = self.run.scheduler.step(
                out, step.timestep, z, **self.run.step_kwargs, return_dict=False
            )
        return stepped[0]

    def _noise_again(self, z: Tensor, calls: range, repeat: int) -> Tensor:
        """From the level after the solver's step back to the one before it.

        FreeDoM, Yu et al. 2023 (arXiv:2303.09833), Algorithm 2.
        """
        noisier, cleaner = self.run.levels.at(calls[0]), self.run.levels.next(calls[-1])
        gain = noisier.a / cleaner.a
        std: float = max(noisier.s**2 - (gain * cleaner.s) ** 2, 0.0) ** 0.5
        fresh = self.run.noise(self.run.latent_shape, calls[0], repeat, "recurrence")
        return gain * z + std * fresh.to(z.dtype)


def sample(
    denoiser: Denoiser | DiffusionPipeline,
    conditions: Condition | Sequence[Condition],
    guidances: Sequence[Guidance] = (),
    **options: Any,
) -> Sampling:
    """Starts drawing images; see `Sampling` for the options."""
    return Sampling(denoiser, conditions, guidances, **options)


def draw(
    denoiser: Denoiser | DiffusionPipeline,
    conditions: Condition | Sequence[Condition],
    guidances: Sequence[Guidance] = (),
    *,
    seeds: Iterable[int] = (0,),
    batch: int = 4,
    tries: int = 1,
    **options: Any,
) -> Tensor:
    """Images (len(seeds), 3, H, W) in [0, 1], drawn in batches.

    Where guidances reject images (`accept`), those are drawn again from seeds derived from their
    own, at most `tries` times in all; the last draw stays.
    """
    denoiser, seeds = as_denoiser(denoiser), list(Seeds(seeds))
    conditions = as_conditions(conditions, len(seeds))
    images: dict[int, Tensor] = {}
    left = list(range(len(seeds)))
    for attempt in range(tries):
        rejected = []
        for i in range(0, len(left), batch):
            part = left[i : i + batch]
            own = [seeds[j] if attempt == 0 else derived_seed(seeds[j], attempt) for j in part]
            drawn = Sampling(
                denoiser, [conditions[j] for j in part], guidances, seeds=own, **options
            ).finish()
            finished = cast(Tensor, drawn.images)
            kept = accepted(drawn.guidances, finished)
            for j, image, keep in zip(part, finished, kept.tolist(), strict=True):
                images[j] = image
                rejected += [] if keep else [j]
        left = rejected
    return torch.stack([images[i] for i in range(len(seeds))])


def accepted(guidances: Sequence[Guidance], images: Tensor) -> Tensor:
    """Which images (B, 3, H, W) every guidance accepts: (B,) bool."""
    kept = torch.ones(len(images), dtype=torch.bool)
    for guidance in guidances:
        kept &= guidance.accept(images).cpu()
    return kept


def _check_numbers(steps: int, **numbers: float) -> None:
    if steps < 1:
        raise GuidekitError(f"steps must be at least 1, not {steps}")
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise GuidekitError(f"{name} must be a finite number of at least 0, not {value}")


def _check_images(
    denoiser: Denoiser, conditions: list[Condition], guidances: Sequence[Guidance]
) -> None:
    """Raises GuidekitError for a reference image that nothing reads."""
    given = any(c.image is not None for c in conditions)
    if given and not (denoiser.reads_image or any(g.reads_image for g in guidances)):
        raise GuidekitError(
            f"{type(denoiser.pipeline).__name__} reads no image; leave it out, or name a plugin "
            "that does, such as semantica with an adapter"
        )


def _check_targets(conditions: list[Condition], guidances: Sequence[Guidance]) -> None:
    """Raises GuidekitError for a target of a guidance that is not there."""
    names = {g.name for g in guidances}
    for name in sorted({name for c in conditions for name in c.targets} - names):
        exist = ", ".join(sorted(names)) or "none"
        raise GuidekitError(f"a condition has a target for {name!r}; the guidances are {exist}")


def _check_scheduler(scheduler: Any, own: Any, steps: int) -> None:
    """Raises GuidekitError for too few steps, and for a flow scheduler for a model that is none.

    And for the reverse. PNDM's Runge-Kutta start takes its `pndm_order` last steps.
    """
    least = getattr(scheduler, "pndm_order", 0)
    if steps < least and not scheduler.config.get("skip_prk_steps", True):
        raise GuidekitError(f"{type(scheduler).__name__} needs at least {least} steps, not {steps}")
    if is_flow(scheduler) != is_flow(own):
        raise GuidekitError(
            f"{type(scheduler).__name__} and the pipeline's {type(own).__name__} differ in what "
            "the model's output means to them: one is for flow models, the other is not; DPM++ and "
            "UniPC are both, by use_flow_sigmas"
        )


def _step_kwargs(scheduler: Any, eta: float, generators: list[torch.Generator]) -> dict[str, Any]:
    """What the scheduler's step takes, as diffusers' pipelines find it out.

    Raises GuidekitError for a noise that the scheduler would ignore.
    """
    accepted = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in accepted:
        raise GuidekitError(
            f"{type(scheduler).__name__} has no eta; leave it at 0 or use --scheduler ddim"
        )
    given = {"eta": eta, "generator": generators}
    return {name: value for name, value in given.items() if name in accepted}
