"""The engine inside an unmodified diffusers pipeline.

    with guidekit.attach(pipe, [Zest()], segments=[Segment("red circle", mask)]) as attached:
        images = pipe("a red circle", generator=generators).images

Five methods are wrapped inside the context and nothing else is changed: `check_inputs` begins a
call, `encode_prompt` says the prompts, the denoiser's `forward` evaluates the guidances,
`scheduler.step` takes their change of the prediction, and `scale_model_input` shows the latents
before they are scaled. Text encoders, VAE, ControlNet, LoRA, IP-Adapter, offloading and callbacks
stay the pipeline's. Steps at which no guidance is active are the pipeline's own. The module is not
called attach, because once imported it would hide the function `guidekit.attach`.
"""

import contextlib
import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from guidekit.account import Account
from guidekit.backbones.denoiser import frozen
from guidekit.backbones.replay import Replay
from guidekit.backbones.tokens import looked_up, segment_columns
from guidekit.conditions import Condition, Layouts, spread_layouts, with_prompts
from guidekit.engine.engine import Engine
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.inputs import as_guidances
from guidekit.levels import Levels
from guidekit.references import Reference, as_reference
from guidekit.run import Run
from guidekit.step import Step
from guidekit.taps import Patch, called

STEP = ("model_output", "timestep", "sample")  # what every scheduler's step begins with
OWN_LOOP = "{} {}, which a pipeline's own loop cannot do; draw with guidekit.sample instead"
_ATTACHED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # denoisers, shared by pipelines


@contextlib.contextmanager
def attach(
    pipe: DiffusionPipeline,
    guidances: Guidance | str | Sequence[Guidance | str],
    *,
    segments: Layouts = (),
    seeds: Sequence[int] | None = None,
    cfg: float | None = None,
    image: Reference | str | Path | None = None,
    memory: str = "fast",
    nonfinite: str = "raise",
    attention: str | None = None,
) -> Iterator["Attached"]:
    """Calls of `pipe` inside the context are guided; afterwards it is as it was.

    segments: those of every image, or a list with one entry per prompt or per image; Conditions
    are taken as layouts whose prompt, if they have one, must be that of the call. seeds: one per
    image for the noise that guidances draw, default 0, 1, ...; the latents come from the call's
    own `generator`. cfg: the call's guidance_scale, only for pipelines that do not keep it
    (PixArt), default their own. image: what guidances follow (`Condition.image`), where a layout
    has none. memory, nonfinite, attention: as for `Sampling`.

    With a list of generators the images are those of `guidekit.sample` with the same seeds, bit
    for bit on Stable Diffusion. Raises GuidekitError for what cannot work in a pipeline:
    acceptance, an own start, a step that is to be repeated, phrases without columns by hand
    together with `prompt_embeds`, prompts that the pipeline has not encoded, and denoiser calls in
    another form than [cond] or [null, cond].
    """
    if cfg is not None and not 0 <= cfg < float("inf"):
        raise GuidekitError(f"cfg is the call's guidance_scale, a finite number, not {cfg}")
    options = {"memory": memory, "nonfinite": nonfinite, "attention": attention}
    attached = Attached(pipe, guidances, segments, seeds, cfg, image, options)
    if not attached.guidances:  # the pipeline itself
        yield attached
        return
    with attached._opened():
        yield attached


class Attached:
    """What is known of the pipeline's latest call: `run`, `account`, `step` with its maps."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        guidances: Sequence[Guidance],
        segments: Layouts,
        seeds: Sequence[int] | None,
        cfg: float | None,
        image: Reference | str | Path | None,
        options: dict[str, Any],
    ):
        self.pipe = pipe
        self.guidances = [g for g in as_guidances(guidances, pipe) if g.scale != 0]
        self.segments, self.seeds, self.cfg, self.options = segments, seeds, cfg, options
        self.image = None if image is None else as_reference(image)
        self.run: Run | None = None
        self.step: Step | None = None  # the latest guided one
        self._call: _Call | None = None
        self._taps = contextlib.ExitStack()  # those of the call's run
        self._stepped: list[Patch] = []  # on the scheduler, which users exchange between calls
        for guidance in self.guidances:
            _refuse_loop(guidance)
        if self.image is not None and not any(g.reads_image for g in self.guidances):
            raise GuidekitError("no guidance here reads an image; leave image out")

    @property
    def account(self):
        """What every guidance did in the latest call."""
        return Account() if self.run is None else self.run.account

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Wraps the pipeline's methods; undoes it whatever happens, in any order with others."""
        self.denoiser = Replay(self.pipe)
        model = self.denoiser.model
        if model in _ATTACHED:
            raise GuidekitError(
                "this pipeline, or another one with the same denoiser, is attached already; give "
                "all guidances to one attach"
            )
        for name in ("check_inputs", "encode_prompt"):
            if not hasattr(self.pipe, name):
                raise GuidekitError(f"{type(self.pipe).__name__} has no {name}, which attach needs")
        patches = []
        with frozen(*self.denoiser.models):
            try:
                _ATTACHED.add(model)
                network = self.denoiser.network
                patches.append(Patch(network, self._around_forward, called(network)))
                for name in ("check_inputs", "encode_prompt", "prepare_extra_step_kwargs"):
                    if hasattr(self.pipe, name):
                        # One by one: those that are in place come off if the next one fails.
                        patch = Patch(self.pipe, getattr(self, f"_around_{name}"), name)
                        patches.append(patch)
                yield
            finally:
                _ATTACHED.discard(model)
                for patch in reversed([*patches, *self._stepped]):
                    patch.remove()
                self._stepped, self._call = [], None
                self._taps.close()

    def _around_check_inputs(self, original, args, kwargs):
        """A call of the pipeline begins."""
        self._taps.close()
        self._call, self.run, self.step = _Call(self), None, None
        for patch in self._stepped:
            patch.remove()
        scheduler = self.pipe.scheduler
        self._stepped = [Patch(scheduler, self._around_step, "step")]
        if hasattr(scheduler, "scale_model_input"):
            self._stepped.append(Patch(scheduler, self._around_scale, "scale_model_input"))
        return original(*args, **kwargs)

    def _around_encode_prompt(self, original, args, kwargs):
        """Its prompts; phrases are looked up before the text encoders run."""
        if self._call:
            given = inspect.signature(original).bind(*args, **kwargs)
            given.apply_defaults()
            words = self._call.prompted(given.arguments)
            with self.denoiser.own.asserted(words):
                return original(*args, **kwargs)
        return original(*args, **kwargs)

    def _around_prepare_extra_step_kwargs(self, original, args, kwargs):
        """What the scheduler's step will be given, known before the first denoiser call."""
        found = original(*args, **kwargs)
        if self._call:
            self._call.step_kwargs = dict(found)
        return found

    def _around_scale(self, original, args, kwargs):
        """The latents as the scheduler carries them."""
        if self._call:
            self._call.carried = args[0] if args else kwargs["sample"]
        return original(*args, **kwargs)

    def _around_forward(self, original, args, kwargs):
        """The guided evaluation in place of the denoiser's call."""
        if self._call:
            self._call.begin(original, args, kwargs)
        if not self._call or not self._call.acts:
            return original(*args, **kwargs)
        with _plainly():
            rows = self._call.evaluate(original, args, kwargs)
        return Transformer2DModelOutput(rows) if kwargs.get("return_dict", True) else (rows,)

    def _around_step(self, original, args, kwargs):
        """The scheduler's step on the guided prediction."""
        call = self._call
        if not call or not call.pending:
            result = original(*args, **kwargs)
        else:
            given = _step_arguments(original, args, kwargs)
            with _plainly():
                given |= call.inject(given)
            first = [given.pop(name) for name in list(given)[: len(args)]]
            result = original(*first, **given)
            with _plainly():
                result = call.edited(result)
        if call and call.stepped():
            self._call = None
            self._taps.close()
        return result


class _Call:
    """One call of the pipeline, from `check_inputs` to its last step."""

    def __init__(self, attached: Attached):
        self.attached, self.pipe, self.denoiser = attached, attached.pipe, attached.denoiser
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
        layouts = spread_layouts(self.attached.segments, len(prompts), count)
        if given.get("prompt_embeds") is not None and looked_up(layouts):
            raise GuidekitError(
                "phrases are looked up in a prompt, and the call gives prompt_embeds; give the "
                "prompt itself, or the columns by hand (Segment(tokens=...))"
            )
        image = self.attached.image
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
                elif self.attached.segments:
                    raise GuidekitError(f"phrases need one prompt; leave {other} out")
        if name == "pixart":  # lower case, and cleaned if the call asks for it
            clean = given["clean_caption"]
            prompts = self.pipe._text_preprocessing(prompts, clean_caption=clean)
        negatives = _listed(given.get("negative_prompt") or "")
        return prompts, negatives * (len(prompts) // len(negatives))

    @property
    def n(self) -> int:
        """Number of steps of the call."""
        return getattr(self.pipe, "num_timesteps", 0) or len(self.pipe.scheduler.timesteps)

    @property
    def acts(self) -> bool:
        level = self.levels.at(self.index)
        active = [g for g in self.attached.guidances if g.active(self.index / self.n, level)]
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
        self.pending = self.attached.step = step
        return self._rows(step, copies)

    def _prepare(self, z: Tensor, scheduler, cfg: float) -> None:
        """The run and the engine, once the shape of the latents is known."""
        seeds = self.attached.seeds
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
            **self.attached.options,
        )
        self.attached.run = run
        self.engine = Engine(run, self.attached.guidances)
        self.attached._taps.enter_context(self.engine.opened())

    def _cfg(self) -> float:
        """The guidance scale with which the pipeline combines null and cond."""
        if (told := self.attached.cfg) is not None:
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
            self.attached.account.warn_idle(self.attached.guidances)
        return True


def _refuse_loop(guidance: Guidance) -> None:
    """Raises GuidekitError for a guidance that needs a loop of its own."""
    why = {
        "begins elsewhere": guidance.overrides("begin"),
        "rejects finished images": guidance.overrides("accept"),
        "jumps back": guidance.overrides("jumps"),
        "resamples particles": guidance.overrides("resample"),
        "needs its own loop": guidance.own_loop,
    }
    for what, true in why.items():
        if true:
            raise GuidekitError(OWN_LOOP.format(guidance.name, what))


def _refuse_repeats(active: list[Guidance], step: Step) -> None:
    """Raises GuidekitError for a guidance that wants this step to be done again."""
    for guidance in active:
        if guidance.repeats(step) > 1:
            raise GuidekitError(OWN_LOOP.format(guidance.name, "repeats steps"))


def _step_arguments(step: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of the scheduler's step by name; a user's wrapper may not name them."""
    names = list(inspect.signature(step).parameters)
    names = names if "model_output" in names else STEP
    return dict(zip(names, args, strict=False)) | kwargs


def _listed(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Outside of inference mode, whose tensors cannot be saved for backward."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _plain(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x
