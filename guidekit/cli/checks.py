"""What can be known to be wrong with the settings of a run before anything is loaded."""

import torch

from guidekit.backbones.schedulers import parse_scheduler
from guidekit.cli.settings import Settings
from guidekit.errors import GuidekitError
from guidekit.run import MEMORY, POLICIES

DTYPES = ("float32", "float16", "bfloat16")


def check_settings(settings: Settings) -> None:
    """Raises GuidekitError for what is known to be wrong before anything is loaded."""
    if settings.scheduler is not None:
        parse_scheduler(settings.scheduler)
    if settings.image is not None and settings.image_folder is not None:
        raise GuidekitError("give image or image_folder, not both")
    if settings.per_image is not None and settings.image_folder is None:
        raise GuidekitError("per_image needs image_folder")
    for name in ("steps", "batch", "tries", "per_image", "height", "width"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise GuidekitError(f"{name} must be at least 1, not {value}")
    choices = {"memory": MEMORY, "nonfinite": POLICIES, "dtype": (None, *DTYPES)}
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            exist = ", ".join(filter(None, allowed))
            raise GuidekitError(f"{name} must be one of {exist}, not {getattr(settings, name)!r}")
    if settings.device is not None:
        _check_device(settings.device)


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError):
        count = torch.cuda.device_count()
        exist = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        raise GuidekitError(f"no device {name!r}; there are {exist}") from None
