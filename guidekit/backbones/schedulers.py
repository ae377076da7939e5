"""Schedulers by the names that people write, and the steps of a run.

`euler-a`, `euler_a`, `EulerAncestral` and diffusers' whole class name are one scheduler; options
follow after colons (`dpm++:karras`) or as diffusers' own documents write them (`DPM++ 2M Karras`).
"""

import inspect
import re
from collections.abc import Collection
from typing import Any

from guidekit.errors import GuidekitError, nearest
from guidekit.noise import is_flow

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++2s": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-a": "KDPM2AncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "sa": "SASolverScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# Those that can follow a flow model's sigmas too (use_flow_sigmas).
FLOW_TOO = ("deis", "dpm++", "dpm++2s", "sa", "unipc")
# What schedulers do, for messages that name others; tests measure it.
#: Every step starts from the z that it is given.
STARTS_FROM_Z = ("ddim", "ddpm", "deis", "dpm++", "euler", "euler-a", "flow-euler", "lcm", "lms")
#: Every step is one call of the denoiser.
ONE_CALL = (*STARTS_FROM_Z, "sa", "unipc")
# Names that other programs have for them, in the form of `_plain`.
ALIASES = {
    "dpmpp2m": "dpm++",
    "dpmsolver": "dpm++",
    "dpmsolverpp": "dpm++",
    "dpm2": "kdpm2",
    "dpm2a": "kdpm2-a",
    "keuler": "euler",
    "keulera": "euler-a",
    "kheun": "heun",
    "klms": "lms",
    "plms": "pndm",
}
SIGMAS = ("karras", "exponential", "beta")  # how noise levels are spaced; one at most
SPACINGS = ("leading", "linspace", "trailing")  # how timesteps are


def schedulers_for(own: Any) -> list[str]:
    """Names of the schedulers for models of the kind that the scheduler `own` is for."""
    flow = [name for name in SCHEDULERS if name.startswith("flow-")]
    if not is_flow(own):
        return [name for name in SCHEDULERS if name not in flow]
    return sorted([*flow, *FLOW_TOO])


def other_scheduler(own: Any, names: Collection[str]) -> str:
    """What a message about the scheduler `own` tells to do: take one of the names, if any fits."""
    fit = [name for name in schedulers_for(own) if name in names]
    return f"use --scheduler {', '.join(fit)}" if fit else "no scheduler of this model does"


def lost_edit(own: Any, what: str) -> GuidekitError:
    """The refusal of a change of z that the scheduler `own` would lose.

    what: who changes it, as "ilvr edits z".
    """
    return GuidekitError(
        f"{what}, and {type(own).__name__} does not start every step from the z it is given; "
        + other_scheduler(own, STARTS_FROM_Z)
    )


def parse_scheduler(text: str) -> tuple[str, tuple[str, ...]]:
    """The short name and the options of a scheduler: `DPM++ 2M Karras` is ("dpm++", ("karras",)).

    Raises GuidekitError that names the nearest scheduler and all there are.
    """
    name, *options = text.split(":")
    plain, names, known = _plain(name), _names(), (*SIGMAS, *SPACINGS)
    options = [option.strip().lower() for option in options]
    while plain not in names and (word := next(filter(plain.endswith, known), None)):
        plain, options = plain.removesuffix(word), [word, *options]
    if plain not in names:
        hint = nearest(plain, names)
        raise GuidekitError(f"no scheduler {text!r}{hint}; there are {', '.join(SCHEDULERS)}")
    for option in options:
        if option not in known:
            raise GuidekitError(f"scheduler {text!r}: no option {option!r}; {_listed(known)}")
    for kind in (SIGMAS, SPACINGS):
        if len(set(kind) & set(options)) > 1:
            raise GuidekitError(f"scheduler {text!r}: give one of {', '.join(kind)}")
    return names[plain], tuple(dict.fromkeys(options))


def scheduler_name(text: str) -> str:
    """The name as `run.json` has it, such as `dpm++:karras`. Raises as `parse_scheduler`."""
    name, options = parse_scheduler(text)
    return ":".join((name, *options))


def scheduler_config(cls: type, options: tuple[str, ...]) -> dict[str, Any]:
    """What the options change in the config of a scheduler's class.

    Raises GuidekitError for an option that the class does not have.
    """
    config: dict[str, Any] = {}
    takes = inspect.signature(cls.__init__).parameters
    for option in options:
        key = f"use_{option}_sigmas" if option in SIGMAS else "timestep_spacing"
        if key not in takes:
            raise GuidekitError(f"{cls.__name__} has no {option} ({key}); leave it out")
        if option in SIGMAS:
            config |= {f"use_{sigmas}_sigmas": sigmas == option for sigmas in SIGMAS}
        else:
            config[key] = option
    return config


def lay_out_steps(
    denoiser, scheduler, steps: int, shape: tuple[int, int, int], **own: list[float]
) -> None:
    """Lays out the steps of a run for latents of `shape` (C, h, w).

    own: `timesteps` or `sigmas` in place of the number of steps. Raises GuidekitError for a number
    of steps that the scheduler cannot have.
    """
    name = type(scheduler).__name__
    try:
        denoiser.set_timesteps(scheduler, steps, shape, **own)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise GuidekitError(f"{name} cannot make {steps} steps: {reason}") from error
    if hasattr(scheduler, "sigmas"):
        return
    # diffusers' "leading" spacing with an offset reaches one timestep too far at the full number.
    first, most = int(scheduler.timesteps.max()), scheduler.config.num_train_timesteps
    if first >= most:
        raise GuidekitError(
            f"{name} with {steps} steps begins at timestep {first}, but the model has 0 to "
            f"{most - 1}; use fewer steps"
        )


def _names() -> dict[str, str]:
    """Every name in the form of `_plain`: the short one it stands for."""
    names = dict(ALIASES)
    for short, cls in SCHEDULERS.items():
        whole = _plain(cls)
        stem = whole.removesuffix("scheduler")
        for name in (_plain(short), whole, stem, stem.removesuffix("discrete")):
            names[name] = short
    return names


def _plain(text: str) -> str:
    """Small letters and digits alone; `++` is `pp`."""
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("++", "pp"))


def _listed(names: tuple[str, ...]) -> str:
    return f"there are {', '.join(names)}"
