"""In which precision and by which algorithms a training computes on its device."""

import contextlib
import dataclasses
import warnings

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def searched_convolutions():
    """cuDNN looks for its fastest algorithms, which pays where steps repeat their shapes."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = before or not cudnn.deterministic
    try:
        yield
    finally:
        cudnn.benchmark = before


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 costs several times what float32 does: CPUs that do not compute in it."""
    mkldnn = torch.backends.mkldnn
    computed = mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == "cpu" and not computed


def warn_of_slow_bf16(accelerator: Accelerator) -> None:
    """A warning where the training's precision is a slow one."""
    if accelerator.mixed_precision == "bf16" and emulates_bf16(accelerator.device):
        warnings.warn(
            "this CPU computes bf16 by emulation, several times slower than float32; train with "
            "--set precision=no",
            stacklevel=3,
        )


def keep_inputs(accelerator: Accelerator) -> None:
    """FSDP2 leaves inputs and outputs as they are, as autocast does: times are not for bf16."""
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, cast_forward_inputs=False, output_dtype=None
        )


def fast_attention(device: torch.device):
    """On a CPU the backward of fused attention is slower than plain matrix products (3 times)."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
