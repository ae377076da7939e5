"""One call of an attached pipeline: its prompts, its levels, the engine at each of its steps."""

import contextlib
import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor

from guidekit.account import Account
from guidekit.backbones.replay import Replay
from guidekit.backbones.tokens import looked_up, segment_columns
from guidekit.conditions import Condition, Layouts, spread_layouts, with_prompts
from guidekit.engine.engine import Engine
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.levels import Levels
from guidekit.references import Reference
from guidekit.run import Run
from guidekit.step import Step

OWN_LOOP = "{} {}, which a pipeline's own loop cannot do; draw with guidekit.sample instead"


@dataclass(frozen=True, eq=False)
class Asked:
    """What `attach` was asked for; the fields are its arguments."""

    guidances: list[Guidance]
    segments: Layouts = ()
    seeds: Sequence[int] | None = None
    cfg: float | None = None
    image: Reference | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of `Run`


class PipelineCall:
    """One call of a pipeline, from `check_inputs` to its last step.

    Its parts are called in this order: `prompted`, then at every step `begin`, `evaluate`,
    `inject`, `edited` and `stepped`.
    """

    def __init__(self, pipe: DiffusionPipeline, denoiser: Replay, asked: Asked):
        self.pipe, self.denoiser, self.asked = pipe, denoiser, asked
        self.run: Run | None = None
        self.step: Step | None = None  # the latest guided one
        self._taps = contextlib.ExitStack()  # those of the run
        self.conditions: list[Condition] | None = None
        self.engine: Engine | None = None
        self.levels: Levels | None = None
        self.step_kwargs: dict = {}
        self.carried: Tensor | None = None
        self.pending: Step | None = None
        self.index = 0

    def prompted(self, given: dict[str, Any]) -> list[str]:
        """Conditions, one per image, of the arguments of `encode_prompt`.

        Returns the prompts in which phrases are looked up.
        """
        if self.conditions is not None:
            raise GuidekitError(
                f"{type(self.pipe).__name__} encodes two prompts for two denoiser calls a step "
                "(true_cfg_scale); attach knows pipelines with one: leave the second prompt out"
            )
        prompts, negatives = self._texts(given)
        count = given.get("num_images_per_prompt") or 1
        layouts = spread_layouts(self.asked.segments, len(prompts), count)
        if given.get("prompt_embeds") is not None and looked_up(layouts):
            raise GuidekitError(
                "phrases are looked up in a prompt, and the call gives prompt_embeds; give the "
                "prompt itself, or the columns by hand (Segment(tokens=...))"
            )
        image = self.asked.image
        layouts = [replace(c, image=image) if c.image is None else c for c in layouts]
        prompts = [p for p in prompts for _ in range(count)]
        negatives = [n for n in negatives for _ in range(count)]
        self.conditions = [
            with_prompts(*both) for both in zip(layouts, prompts, negatives, strict=True)
        ]
        self.denoiser.start(prompts, negatives)
        for condition in self.conditions:
            segment_columns(self.denoiser.tokenizers, condition)
        return looked_up(self.conditions)

    def _texts(self, given: dict[str, Any]) -> tuple[list[str], list[str]]:
        """The prompts that the phrases are looked up in, and the negative ones."""
        if (embeds := given.get("prompt_embeds")) is not None:
            return [""] * len(embeds), [""] * len(embeds)
        prompts, name = _listed(given["prompt"]), self.denoiser.family.name
        for other in ("prompt_2", "prompt_3"):
            if given.get(other) and _listed(given[other]) != prompts:
                if name == "flux":  # its T5 reads the second; the first is pooled
                    prompts = _listed(given[other])
                elif self.asked.segments:
                    raise GuidekitError(f"phrases need one prompt; leave {other} out")
        if name == "pixart":  # lower case, and cleaned if the call asks for it
            clean = given["clean_caption"]
            prompts = self.pipe._text_preprocessing(prompts, clean_caption=clean)
        negatives = _listed(given.get("negative_prompt") or "")
        return prompts, negatives * (len(prompts) // len(negatives))

    @property
    def account(self) -> Account:
        """What every guidance did."""
        return Account() if self.run is None else self.run.account

    @property
    def n(self) -> int:
        """Number of steps of the call."""
        return getattr(self.pipe, "num_timesteps", 0) or len(self.pipe.scheduler.timesteps)

    @property
    def acts(self) -> bool:
        """Whether a guidance is active at the step that is about to be made."""
        level = self.levels.at(self.index)
        active = [g for g in self.asked.guidances if g.active(self.index / self.n, level)]
        ends, first = self.levels.ends_step(self.index), self.levels.step(self.index)[0]
        refines = [g for g in active if g.overrides("refine") and self.index == first]
        return bool(refines) or any(ends or g.acts_at == "calls" for g in active)

    def begin(self, forward, args: tuple, kwargs: dict) -> None:
        """The levels of the call, read before the scheduler's first step."""
        if self.levels is None:
            scheduler = self._bare_scheduler()
            self.denoiser.record(forward, args, kwargs)
            start = self.denoiser.position(scheduler, self.n)
            self.levels = Levels(scheduler, self.step_kwargs, start)

    def evaluate(self, forward, args: tuple, kwargs: dict) -> Tensor:
        """The denoiser's output for all rows of the pipeline's call, guided."""
        if self.pending:
            raise GuidekitError(
                f"{type(self.pipe).__name__} calls its denoiser twice in one step, as skip-layer "
                "guidance does; attach knows pipelines with one call"
            )
        if self.conditions is None:
            raise GuidekitError(
                f"{type(self.pipe).__name__} has encoded no prompt before it denoises"
            )
        denoiser, scheduler = self.denoiser, self._bare_scheduler()
        denoiser.record(forward, args, kwargs)
        copies = denoiser.copies
        seen = denoiser.input if self.carried is None else self.carried
        z = denoiser.unpack(_plain(seen[: len(self.conditions)]))
        timestep = scheduler.timesteps[self.levels.start + self.index]
        denoiser.begin(timestep, z)
        cfg = self._cfg() if copies == 2 else 1.0
        if self.engine is None:
            self._prepare(z, scheduler, cfg)
        run = self.engine.run
        run.scheduler, run.cfg = scheduler, cfg
        step = self.engine.evaluate(z, timestep, self.index, self.n)
        _refuse_repeats(self.engine.active(step), step)
        self.pending = self.step = step
        return self._rows(step, copies)

    def _prepare(self, z: Tensor, scheduler, cfg: float) -> None:
        """The run and the engine, once the shape of the latents is known."""
        seeds = self.asked.seeds
        seeds = list(range(len(z))) if seeds is None else list(seeds)
        if len(seeds) != len(z):
            raise GuidekitError(f"{len(seeds)} seeds for {len(z)} images; give one per image")
        run = Run(
            self.denoiser,
            self.conditions,
            seeds,
            tuple(z.shape[1:]),
            scheduler,
            cfg=cfg,
            step_kwargs=self.step_kwargs,
            levels=self.levels,
            **self.asked.options,
        )
        self.run = run
        self.engine = Engine(run, self.asked.guidances)
        self._taps.enter_context(self.engine.opened())

    def _cfg(self) -> float:
        """The guidance scale with which the pipeline combines null and cond."""
        if (told := self.asked.cfg) is not None:
            if told <= 1:
                raise GuidekitError(
                    f"cfg is {told:g}, and {type(self.pipe).__name__} calls its denoiser for null "
                    "and cond; give attach the guidance_scale of the call as cfg, or leave it out"
                )
            return told
        kept = getattr(self.pipe, "guidance_scale", None)
        own = inspect.signature(type(self.pipe).__call__).parameters["guidance_scale"].default
        return own if kept is None else kept

    def _bare_scheduler(self):
        """The scheduler as it stands, without the wrappers: probes take steps with copies of it."""
        bare = copy.copy(self.pipe.scheduler)
        for name in ("step", "scale_model_input"):
            vars(bare).pop(name, None)
        return bare

    def _rows(self, step: Step, copies: int) -> Tensor:
        """What the pipeline is given for [null, cond]: their outputs, to combine as it does.

        Where guidances combine otherwise it is their result in every row, which passes through
        null + scale * (cond - null) unchanged.
        """
        own = any(
            g.overrides("combine") or g.overrides("branches") for g in self.engine.active(step)
        )
        if own and getattr(self.pipe, "guidance_rescale", 0.0):
            names = ", ".join(g.name for g in self.engine.active(step))
            raise GuidekitError(
                f"guidance_rescale has no effect beside a plugin that combines branches ({names}); "
                "leave it at 0"
            )
        names = ["cond"] if copies == 1 else ["null", "cond"]
        outs = [step.out] * copies if own else [step.evals[name].out for name in names]
        rows = self.denoiser.pack(torch.cat([out.detach() for out in outs]))
        # PixArt's pipeline cuts the learned variance off.
        missing = self.denoiser.model.config.out_channels - rows.shape[1] if rows.ndim == 4 else 0
        return F.pad(rows, (0, 0, 0, 0, 0, missing))

    def inject(self, given: dict[str, Any]) -> dict[str, Tensor]:
        """What `scheduler.step` is given in place of the pipeline's own output, and z if refined.

        The prediction is made from the pipeline's own combination of the outputs.
        """
        step, out = self.pending, self.denoiser.unpack(_plain(given["model_output"]))
        fixed = ("model_output", "timestep", "sample", "generator", "return_dict")
        more = {k: v for k, v in given.items() if k not in fixed}
        if more != {k: v for k, v in self.step_kwargs.items() if k not in fixed}:
            raise GuidekitError(f"scheduler.step is given {more}, which attach did not foresee")
        self._check_combination(step, out)
        self.engine.inject(step, out)
        injected = {"model_output": self.denoiser.pack(step.prediction)}
        if step.z is not step.carried:
            injected["sample"] = self.denoiser.pack(step.z)
        return injected

    def _check_combination(self, step: Step, out: Tensor) -> None:
        """Raises GuidekitError if energies saw another x0 than the pipeline's.

        Energies of attention and features do not read it; of guidance_rescale they see the x0
        before it.
        """
        reads = any(g.overrides("energy") and g.graph == "x0" for g in self.engine.active(step))
        if not reads or getattr(self.pipe, "guidance_rescale", 0.0):
            return
        own = step.out.detach()
        if (out - own).abs().max() > 1e-2 * own.abs().max():
            raise GuidekitError(
                f"{type(self.pipe).__name__} does not combine null and cond with the scale "
                f"{self.engine.run.cfg:g}; give attach the guidance_scale of the call as cfg"
            )

    def edited(self, result: Any) -> Any:
        """The scheduler's result with the next z as the guidances leave it."""
        step, z = self.pending, result[0]
        edited = self.engine.edit_sample(step, self.denoiser.unpack(_plain(z)))
        edited = self.denoiser.pack(edited)
        if isinstance(result, tuple):
            return (edited, *result[1:])
        return replace(result, prev_sample=edited)

    def stepped(self) -> bool:
        """Counts a step; True after the last one, when idle guidances are warned of."""
        self.index, self.pending, self.carried = self.index + 1, None, None
        if self.index < self.n:
            return False
        if self.engine:
            self.engine.close()
        else:  # no step was in any window
            self.account.warn_idle(self.asked.guidances)
        return True

    def close(self) -> None:
        """Takes the run's taps off the model."""
        self._taps.close()


def _refuse_repeats(active: list[Guidance], step: Step) -> None:
    """Raises GuidekitError for a guidance that wants this step to be done again."""
    for guidance in active:
        if guidance.repeats(step) > 1:
            raise GuidekitError(OWN_LOOP.format(guidance.name, "repeats steps"))


def _listed(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _plain(x: Tensor) -> Tensor:
    """The tensor outside of inference mode, whose tensors cannot be saved for backward."""
    return x.clone() if x.is_inference() else x
