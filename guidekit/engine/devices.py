"""What a denoiser that is spread over several devices can be told, and tell."""

from guidekit.errors import GuidekitError
from guidekit.guidance import Guidance
from guidekit.run import Run


def check_devices(run: Run, guidances: list[Guidance]) -> None:
    """Raises GuidekitError for guidance that a part of an image on each device would mislead.

    Under diffusers' context parallelism an attention call sees the tokens of its device alone, and
    what is exchanged between devices has no gradient; under tensor parallelism it sees some heads.
    """
    if getattr(run.denoiser.model, "_parallel_config", None) is None:
        return
    for guidance in guidances:
        attention = run.reads.edited(guidance, "attention") or run.reads.of([guidance])
        graph = guidance.overrides("energy") and guidance.graph != "input"
        if attention or graph:
            raise GuidekitError(
                f"{guidance.name} {'reads or edits attention' if attention else 'needs gradients'}"
                ", and this model is spread over devices by enable_parallelism; draw other images "
                "on the other devices instead (guidekit sample --plan)"
            )
