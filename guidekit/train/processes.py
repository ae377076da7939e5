"""The processes of a training, before any of them touches a device or waits for another."""

import os
from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from guidekit.errors import GuidekitError

# A process waits for those whose share of the pages is not encoded yet; half an hour would cut it
# short. What started the processes ends all of them when one dies.
PATIENCE = timedelta(days=1)


def processes() -> PartialState:
    """accelerate's state of this process: its rank, how many there are, its device.

    Raises GuidekitError where several processes were started that would not train together.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and state.num_processes == 1:
        raise GuidekitError(
            f"{started} processes were started and no GPU is here; set ACCELERATE_USE_CPU=true to "
            "train together on CPUs"
        )
    return state
