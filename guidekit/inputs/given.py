"""What users pass to `sample`, `draw` and `attach`, as the core takes it; the rest is refused."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin

from guidekit.backbones import loading
from guidekit.backbones.denoiser import Denoiser
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.registry import Registry
from guidekit.zoo.shipped import ZOO, model_defaults, tuned_options


def as_denoiser(model: object) -> Denoiser:
    """The denoiser of a live pipeline, or of the name of a model (see `load`).

    Raises GuidekitError for anything else.
    """
    if isinstance(model, Denoiser):
        return model
    if isinstance(model, str | Path):
        model = load(str(model))
    if isinstance(model, DiffusionPipeline):
        return Denoiser(model)
    raise GuidekitError(
        f"a model is a diffusers pipeline, a guidekit.Denoiser or a name, not "
        f"{type(model).__name__}"
    )


def load(name: str, device: str | None = None, dtype: Any = None) -> DiffusionPipeline:
    """A pipeline by a built-in's name, a directory, a hub id, or a plugin's `shop:mini`.

    device: default CUDA if there is one. dtype: default float32 on a CPU and for built-ins. Raises
    GuidekitError that says what exists.
    """
    name = str(name)
    if ":" not in name or Path(name).exists():
        return loading.load(name, device, dtype)
    pipeline = Registry().backbone(name)()
    device = device or loading.default_device()
    moved: DiffusionPipeline = pipeline.to(*filter(None, (device, dtype)))
    return moved


def tuned(pipeline: Any) -> dict[str, Any]:
    """A built-in's tuned `steps`, `cfg` and `plugin` tables; empty for other pipelines."""
    path = Path(str(pipeline.config.get("_name_or_path", "")))
    return model_defaults(path.name) if path.parent == ZOO else {}


def as_conditions(given: object, count: int) -> list[Condition]:
    """A condition for each of `count` images: one for all, or a list of so many.

    A text is a prompt, a whole number a class. Raises GuidekitError for anything else.
    """
    if isinstance(given, str | int | Condition):
        return [_as_condition(given)] * count
    if not isinstance(given, Iterable):
        return [_as_condition(given)]
    conditions = [_as_condition(one) for one in given]
    if len(conditions) != count:
        raise GuidekitError(f"{len(conditions)} conditions for {count} seeds; give one per seed")
    return conditions


def _as_condition(given: object) -> Condition:
    if isinstance(given, Condition):
        return given
    if isinstance(given, str):
        return Condition(given)
    if isinstance(given, int) and not isinstance(given, bool):
        return Condition(label=given)
    raise GuidekitError(
        "a condition is a prompt, a class or guidekit.Condition(prompt, segments=...), not "
        f"{type(given).__name__}"
    )


def as_guidances(given: object, pipeline: DiffusionPipeline) -> list[Guidance]:
    """Guidances of one or several, each an object or a plugin's name, in their order.

    Options that were not given take the values that are tuned for the built-in model, as on the
    command line. Raises GuidekitError for anything else, and for one object that is given twice.
    """
    several = [given] if isinstance(given, str | Guidance) else given
    if not isinstance(several, Iterable):
        raise GuidekitError(f"guidances are objects or names, not {type(given).__name__}")
    found = [_as_guidance(one) for one in several]
    for i, one in enumerate(found):
        if any(one is other for other in found[:i]):
            raise GuidekitError(f"{one.name} is given twice; make two of it, or leave one out")
    return [_with_tuned(one, tuned(pipeline)) for one in found]


def _as_guidance(given: object) -> Guidance:
    if isinstance(given, Guidance):
        return given
    if isinstance(given, str):
        return make(given)
    if isinstance(given, type) and issubclass(given, Guidance):
        return given()
    raise GuidekitError(
        "a guidance is an object such as guidekit.make('zest', stop=0.5), or a plugin's name, not "
        f"{type(given).__name__}"
    )


def _with_tuned(guidance: Guidance, own: dict[str, Any]) -> Guidance:
    """A copy with tuned values in the fields that were not given; itself if there are none."""
    given = {name: getattr(guidance, name) for name in guidance.given}
    if not (values := tuned_options(own, guidance.name, given)):
        return guidance
    copied = copy.copy(guidance)
    for name, value in values.items():
        setattr(copied, name, value)
    return copied


def make(name: str, **options: Any) -> Guidance:
    """A guidance by its plugin's name: `make("zest", stop=0.5)`.

    Raises GuidekitError that names the plugins, or the options, that exist.
    """
    return Registry().make_guidance(name, options)


def as_scheduler(given: object, pipeline: Any) -> Any:
    """A scheduler of an instance or a short name; the pipeline's own of None."""
    if given is None:
        return pipeline.scheduler
    if isinstance(given, str):
        return loading.make_scheduler(pipeline, given)
    if isinstance(given, SchedulerMixin):
        return given
    raise GuidekitError(
        f"a scheduler is one of diffusers, or a name such as 'ddim', not {type(given).__name__}"
    )
