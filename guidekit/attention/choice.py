"""The implementations of attention: which there are, which can run here, and which is used."""

import functools
import importlib
import importlib.util
import os
import subprocess
import sys

import torch
from torch import Tensor

from guidekit.errors import GuidekitError

IMPLEMENTATIONS = ("eager", "sdpa", "triton", "xformers")
KERNELS = "guidekit_kernels"
CHECKING = 300  # seconds that the kernels' own check may take


def implementations() -> dict[str, str]:
    """Name to "available" or the reason why not, on this machine's default device."""
    return {name: _state(name) for name in IMPLEMENTATIONS}


def choose(name: str | None = None) -> str:
    """The implementation to use: `name`, else GUIDEKIT_ATTENTION, else by measurement.

    By measurement is "auto", sdpa or triton call by call as `automatic` says, on a GPU for whose
    compute capability `guidekit_kernels` has measured times and on which its check has passed;
    elsewhere it is sdpa.
    xformers is used only when named. The result belongs in run.json. Raises GuidekitError for an
    unknown name and RuntimeError for one that cannot run here.
    """
    name = name or os.environ.get("GUIDEKIT_ATTENTION") or "auto"
    if name == "auto":
        return "auto" if measured_on() and _state("triton") == "available" else "sdpa"
    if name not in IMPLEMENTATIONS:
        raise GuidekitError(f"no attention implementation {name!r}; there are {IMPLEMENTATIONS}")
    if _state(name) != "available":
        there = ", ".join(n for n, state in implementations().items() if state == "available")
        raise RuntimeError(f"attention {name!r} cannot run: {_state(name)}; available: {there}")
    return name


def automatic(query: Tensor, key: Tensor) -> str:
    """sdpa or triton for one call with maps, whichever was measured faster at such sizes."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if not (query.is_cuda and half):  # only halves are measured
        return "sdpa"
    return "triton" if importlib.import_module(f"{KERNELS}.timings").faster(query, key) else "sdpa"


def measured_on() -> str | None:
    """The GPU on which the kernels were measured, if it is of this one's compute capability."""
    if not torch.cuda.is_available() or importlib.util.find_spec(KERNELS) is None:
        return None
    timings = importlib.import_module(f"{KERNELS}.timings")
    return timings.measured(torch.cuda.get_device_capability())


def _state(name: str) -> str:
    if name in ("eager", "sdpa"):
        return "available"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _triton_state(device) if name == "triton" else _xformers_state(device)


@functools.cache
def _triton_state(device: str) -> str:
    return _triton_lacks(device) or (_checked() if device == "cuda" else "available")


def _triton_lacks(device: str) -> str:
    """What the kernels need and is not there; empty if nothing."""
    if importlib.util.find_spec(KERNELS) is None:
        return f"{KERNELS} is not installed"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda":
        return "" if os.environ.get("TRITON_INTERPRET") == "1" else "no CUDA device"
    if torch.cuda.get_device_capability()[0] < 8:
        return "the GPU's compute capability is below 8.0"
    return importlib.import_module(f"{KERNELS}.ptxas").fault()


def _checked() -> str:
    """Availability by the kernels' own check on the first GPU, run once and then remembered.

    In a process of its own, because a fault in a kernel ends all use of the GPU in its process.
    """
    if importlib.import_module(f"{KERNELS}.record").passed().exists():
        return "available"
    command = [sys.executable, "-m", f"{KERNELS}.check"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CHECKING)
    except subprocess.TimeoutExpired:
        return f"its check on this GPU did not end in {CHECKING} seconds"
    if run.returncode == 0:
        return "available"
    told = (run.stdout.strip() or run.stderr.strip() or f"exit code {run.returncode}").splitlines()
    return f"its check on this GPU failed ({told[-1]})"


@functools.cache
def _xformers_state(device: str) -> str:
    """Availability by a real one-token call: an importable xformers often has no operator."""
    if importlib.util.find_spec("xformers") is None:
        return 'xformers is not installed: pip install "guidekit[xformers]"'
    dtype = torch.float16 if device == "cuda" else torch.float32
    one = torch.zeros(1, 1, 1, 8, device=device, dtype=dtype)
    try:
        from xformers.ops import memory_efficient_attention

        memory_efficient_attention(one, one, one)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        return f"a one-token call on {device} failed: {str(error).splitlines()[0]}"
    return "available"
