"""The assembler that triton uses: its version, and the versions that make wrong code.

On compute capability 9.0, ptxas 12.8.93 (triton 3.6) gave products from shared memory wrong
addresses where a kernel has one pipeline stage, as ours have; 12.9, 13.0 and 13.3 made the right
ones of the same PTX. Other architectures have no such products.
"""

import torch

OLDEST = (12, 9)
REMEDY = (
    "install triton 3.8 or newer, or let TRITON_PTXAS_PATH name a newer ptxas, such as that of "
    "pip install nvidia-cuda-nvcc"
)


def version(capability: tuple[int, int] | None = None) -> str:
    """Version of the ptxas for a compute capability, by default the first GPU's."""
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = capability or torch.cuda.get_device_capability()
    return get_ptxas(10 * major + minor).version


def fault(capability: tuple[int, int] | None = None) -> str:
    """Why kernels for a compute capability would be wrong, with the remedy; empty if not."""
    capability = capability or torch.cuda.get_device_capability()
    if capability[0] != 9:
        return ""
    found = version(capability)
    if tuple(map(int, found.split("."))) >= OLDEST:
        return ""
    return f"ptxas {found} makes wrong code for compute capability 9: {REMEDY}"
