"""What a run will draw, decided once: settings, condition, guidances, a target for every seed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from guidekit.backbones.compiled import as_backend
from guidekit.backbones.controls import Control
from guidekit.backbones.denoiser import Denoiser
from guidekit.backbones.loading import make_scheduler
from guidekit.backbones.residuals import with_controls
from guidekit.backbones.schedulers import scheduler_name
from guidekit.backbones.tokens import append_phrases
from guidekit.cli.controls import control_tables, read_controls, read_map
from guidekit.cli.models import load_model
from guidekit.cli.settings import Settings
from guidekit.conditions import Condition
from guidekit.errors import GuidekitError, blame
from guidekit.groups import batches, with_particles
from guidekit.guidance import Guidance
from guidekit.layouts import load_layout, parse_layout, parse_segment
from guidekit.options import code_named, stated
from guidekit.outputs import folders
from guidekit.references import Reference, load_reference, load_references
from guidekit.registry import Registry
from guidekit.run import MEMORY, POLICIES
from guidekit.sampler import STEPS
from guidekit.seeds import Seeds
from guidekit.zoo.shipped import example_layout, model_defaults, tuned_options

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Target:
    """One image to draw: its seed, its path in the run's folder, and what is asked of it."""

    seed: int
    path: str
    condition: Condition


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a run draws and with what; see `make_plan`."""

    #: What the user asked, completed by the model's own values: the tables of run.json.
    settings: Settings
    denoiser: Denoiser
    #: None for the pipeline's own.
    scheduler: Any
    #: What all images have in common.
    condition: Condition
    guidances: tuple[Guidance, ...]
    #: As the user named them; the denoiser has them loaded.
    controls: tuple[Control, ...]
    targets: tuple[Target, ...]
    #: New, and this run's alone.
    folder: Path

    @property
    def batches(self) -> list[tuple[Target, ...]]:
        """The targets that are drawn together."""
        conditions = [target.condition for target in self.targets]
        rows = batches(conditions, self.settings.batch)
        return [tuple(self.targets[row] for row in batch) for batch in rows]

    @property
    def follows_folder(self) -> bool:
        """Whether every image follows one of a folder: a data set."""
        return self.settings.image_folder is not None

    @property
    def compares(self) -> bool:
        """Whether the same seeds are also drawn without guidance; not for a data set."""
        guided = any(guidance.scale != 0 for guidance in self.guidances)
        return guided and self.settings.compare and not self.follows_folder


def make_plan(
    settings: Settings,
    blocked: tuple[str, ...] = (),
    load: Callable[..., Any] = load_model,
) -> Plan:
    """The plan of a run: checks what can be checked, makes the folder, loads the model.

    blocked: plugins that must not be imported. load: `load_model`, or what keeps the models of
    several runs. Raises GuidekitError for settings that cannot work, before anything is loaded
    where it can be known by then.
    """
    registry = Registry(blocked)
    guidances, asked = checked(settings, registry)
    references = _references(settings)
    name = asked.prompt or Path(settings.model).name
    folder = folders.new_folder(settings.out, name)
    with folders.removed_if_empty(folder):
        return _loaded(settings, registry, guidances, asked, references, folder, load)


def plan_of_none(settings: Settings, folder: Path, blocked: tuple[str, ...] = ()) -> Plan:
    """A plan without targets, which are added later, in a folder that is there.

    Raises GuidekitError as `make_plan`.
    """
    registry = Registry(blocked)
    guidances, asked = checked(settings, registry)
    return _loaded(settings, registry, guidances, asked, None, folder)


def _loaded(
    settings: Settings,
    registry: Registry,
    guidances: tuple[Guidance, ...],
    asked: Condition,
    references: dict[str, Reference] | None,
    folder: Path,
    load: Callable[..., Any] = load_model,
) -> Plan:
    """The plan with its model; without targets where `references` is None."""
    own, controls = model_defaults(settings.model), read_controls(settings)
    pipeline = load(settings.model, registry, settings.device, settings.dtype)
    denoiser = with_controls(Denoiser(pipeline), controls)
    condition = completed(asked, settings, denoiser)
    targets = () if references is None else _targets(settings, condition, references)
    targets = in_groups(targets, settings.particles)
    scheduler = settings.scheduler and make_scheduler(pipeline, settings.scheduler)
    return Plan(
        settings=_resolved(settings, own, denoiser, condition, guidances, targets, controls),
        denoiser=denoiser,
        scheduler=scheduler,
        condition=condition,
        guidances=guidances,
        controls=controls,
        targets=targets,
        folder=folder,
    )


def checked(settings: Settings, registry: Registry) -> tuple[tuple[Guidance, ...], Condition]:
    """The guidances and the condition of the settings, without the model.

    Raises GuidekitError for what is known to be wrong before anything is loaded.
    """
    check_settings(settings)
    own = model_defaults(settings.model)
    guidances = tuple(_guidance(registry, settings, own, name) for name in settings.plugin)
    return guidances, condition_of(settings)


def check_settings(settings: Settings) -> None:
    """Raises GuidekitError for what is known to be wrong before anything is loaded."""
    if settings.scheduler is not None:
        scheduler_name(settings.scheduler)
    if settings.image is not None and settings.image_folder is not None:
        raise GuidekitError("give image or image_folder, not both")
    if settings.per_image is not None and settings.image_folder is None:
        raise GuidekitError("per_image needs image_folder")
    if settings.tries > 1 and settings.particles > 1:
        raise GuidekitError("tries draws single images again, which would cut groups of particles")
    for name in ("steps", "batch", "tries", "particles", "per_image", "height", "width"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise GuidekitError(f"{name} must be at least 1, not {value}")
    choices = {"memory": MEMORY, "nonfinite": POLICIES, "dtype": (None, *DTYPES)}
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            exist = ", ".join(filter(None, allowed))
            raise GuidekitError(f"{name} must be one of {exist}, not {getattr(settings, name)!r}")
    as_backend(settings.compile)
    if settings.device is not None:
        _check_device(settings.device)


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError):
        count = torch.cuda.device_count()
        exist = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise GuidekitError(f"no device {name!r}; there are {exist}") from None


def _guidance(registry: Registry, settings: Settings, own: dict[str, Any], name: str) -> Guidance:
    """A guidance with the user's options over those that are tuned for the model."""
    changes = settings.changes.get(name, {})
    options = tuned_options(own, name, settings.plugin[name] | changes) | settings.plugin[name]
    _refuse_code(registry.guidance_class(name), name, settings.plugin[name], changes)
    with blame(name, "options"):
        return registry.make_guidance(name, options, settings.folder, changes)


def _refuse_code(
    cls: type[Guidance], name: str, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Raises GuidekitError for code that a file names: it runs only if the user names it too."""
    for option, value in code_named(cls, options).items():
        if option not in changes:
            raise GuidekitError(
                f"the settings name code, {value!r}, which would be imported; if you trust it, "
                f"say so by --set {name}.{option}={value}"
            )


def condition_of(settings: Settings) -> Condition:
    """The condition of the settings: the layout, then the segments, in the given order."""
    layout = Condition() if settings.layout is None else load_layout(settings.layout)
    texts = [entry for entry in settings.segment if isinstance(entry, str)]
    tables = [entry for entry in settings.segment if not isinstance(entry, str)]
    parsed = parse_layout({"segments": tables}, settings.folder, "config").segments
    segments = (*layout.segments, *parsed, *map(parse_segment, texts))
    prompt = layout.prompt if settings.prompt is None else settings.prompt
    negative = layout.negative if settings.negative is None else settings.negative
    if settings.prompt is None and not prompt and segments and not settings.append_phrases:
        raise GuidekitError("there are segments but no prompt; give --prompt with their phrases")
    label = layout.label if settings.label is None else settings.label
    image = None if settings.image is None else load_reference(settings.image)
    return Condition(prompt, negative, segments, label, image, read_map(settings))


def guidance_options(settings: Settings, blocked: tuple[str, ...] = ()) -> Settings:
    """The settings with every option of every plugin, for whichever process reads them later."""
    registry, own = Registry(blocked), model_defaults(settings.model)
    made = [_guidance(registry, settings, own, name) for name in settings.plugin]
    for guidance in made:
        for option, value in code_named(type(guidance), stated(guidance)).items():
            raise GuidekitError(
                f"a plan names no code, and {guidance.name}.{option} is {value!r}: make a plugin "
                "of it (guidekit plugins new)"
            )
    return replace(settings, plugin={g.name: stated(g) for g in made}, changes={})


def is_empty(settings: Settings, condition: Condition) -> bool:
    """Whether there is no prompt, not even an empty one, and nothing in its place."""
    follows = settings.image_folder is not None
    nothing = condition == Condition(negative=condition.negative)
    return settings.prompt is None and nothing and not follows


def completed(condition: Condition, settings: Settings, denoiser: Denoiser) -> Condition:
    """The condition as this model reads it."""
    if denoiser.reads_text and is_empty(settings, condition):
        example = load_layout(example_layout(settings.model))
        condition = replace(example, negative=condition.negative)
    return append_wanted(denoiser.prepared(condition), settings, denoiser)


def append_wanted(condition: Condition, settings: Settings, denoiser: Denoiser) -> Condition:
    """The condition with its phrases added to the prompt where the settings say so."""
    if settings.append_phrases and denoiser.tokenizers:
        condition = append_phrases(condition, denoiser.tokenizers[0])
    return condition


def _references(settings: Settings) -> dict[str, Reference]:
    """The images of the folder by name; none without a folder."""
    if settings.image_folder is None:
        return {}
    seeds = settings.seeds
    if seeds != tuple(range(seeds[0], seeds[0] + len(seeds))):
        raise GuidekitError(
            "image_folder draws per_image images of each, with one seed after the other; "
            f"give the first alone, --seeds {seeds[0]}"
        )
    return load_references(settings.image_folder)


def _targets(
    settings: Settings, condition: Condition, references: dict[str, Reference]
) -> tuple[Target, ...]:
    """A target for every seed; for a folder of images, each's from the first seed on."""
    if not references:
        return tuple(Target(seed, f"{seed}.png", condition) for seed in settings.seeds)
    each = settings.per_image or 1
    owners = [pair for pair in references.items() for _ in range(each)]
    return tuple(
        Target(seed, f"{name}/{seed}.png", replace(condition, image=image))
        for seed, (name, image) in enumerate(owners, settings.seeds[0])
    )


def in_groups(targets: tuple[Target, ...], particles: int) -> tuple[Target, ...]:
    """The targets with the particles of one group after one another."""
    conditions = with_particles([target.condition for target in targets], particles)
    return tuple(replace(t, condition=c) for t, c in zip(targets, conditions, strict=True))


def _resolved(
    settings: Settings,
    own: dict[str, Any],
    denoiser: Denoiser,
    condition: Condition,
    guidances: tuple[Guidance, ...],
    targets: tuple[Target, ...],
    controls: tuple[Control, ...],
) -> Settings:
    """The settings with every choice that the user left to the model."""
    cfg = own.get("cfg", denoiser.cfg) if settings.cfg is None else settings.cfg
    return replace(
        settings,
        prompt=condition.prompt,
        negative=condition.negative,
        label=condition.label,
        segment=folders.segment_tables(condition.segments),
        control=control_tables(controls),
        plugin={guidance.name: stated(guidance) for guidance in guidances},
        seeds=Seeds(target.seed for target in targets) if targets else settings.seeds,
        steps=own.get("steps", STEPS) if settings.steps is None else settings.steps,
        scheduler=settings.scheduler and scheduler_name(settings.scheduler),
        cfg=cfg,
        device=str(denoiser.device),
        dtype=str(denoiser.dtype).removeprefix("torch."),
    )
