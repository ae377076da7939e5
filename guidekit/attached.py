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
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from guidekit.account import Account
from guidekit.backbones.denoiser import frozen
from guidekit.backbones.replay import Replay
from guidekit.conditions import Layouts
from guidekit.engine.pipeline_call import OWN_LOOP, Asked, PipelineCall
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.inputs.given import as_guidances
from guidekit.references import Reference, as_reference
from guidekit.run import Run
from guidekit.step import Step
from guidekit.taps import Patch, called

STEP = ("model_output", "timestep", "sample")  # what every scheduler's step begins with
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
        self.image = None if image is None else as_reference(image)
        self._asked = Asked(self.guidances, segments, seeds, cfg, self.image, options)
        self._call: PipelineCall | None = None  # the one that is running
        self._latest: PipelineCall | None = None
        self._stepped: list[Patch] = []  # on the scheduler, which users exchange between calls
        for guidance in self.guidances:
            _refuse_loop(guidance)
        if self.image is not None and not any(g.reads_image for g in self.guidances):
            raise GuidekitError("no guidance here reads an image; leave image out")

    @property
    def run(self) -> Run | None:
        """The run of the latest call; None before its first guided step."""
        return self._latest and self._latest.run

    @property
    def step(self) -> Step | None:
        """The latest guided step of the latest call."""
        return self._latest and self._latest.step

    @property
    def account(self) -> Account:
        """What every guidance did in the latest call."""
        return self._latest.account if self._latest else Account()

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
                self._stepped = []
                self._end()

    def _around_check_inputs(self, original, args, kwargs):
        """A call of the pipeline begins."""
        self._end()
        self._call = self._latest = PipelineCall(self.pipe, self.denoiser, self._asked)
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
            self._end()
        return result

    def _end(self) -> None:
        """The call is over, or is given up."""
        if self._call:
            self._call.close()
        self._call = None


def _refuse_loop(guidance: Guidance) -> None:
    """Raises GuidekitError for a guidance that needs a loop of its own."""
    why = {
        "begins elsewhere": guidance.overrides("begin"),
        "rejects finished images": guidance.overrides("accept"),
        "draws by a loop of its own": guidance.overrides("solve"),
        "jumps back": guidance.overrides("jumps"),
        "resamples particles": guidance.overrides("resample"),
        "needs its own loop": guidance.own_loop,
    }
    for what, true in why.items():
        if true:
            raise GuidekitError(OWN_LOOP.format(guidance.name, what))


def _step_arguments(step: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of the scheduler's step by name; a user's wrapper may not name them."""
    names = list(inspect.signature(step).parameters)
    names = names if "model_output" in names else STEP
    return dict(zip(names, args, strict=False)) | kwargs


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Outside of inference mode, whose tensors cannot be saved for backward."""
    with torch.inference_mode(False), torch.no_grad():
        yield
