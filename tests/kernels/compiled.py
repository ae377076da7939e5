"""Compiles the attention kernels for a GPU that need not be there, and says what they use.

Run as a script in its own process (no TRITON_INTERPRET): `python compiled.py ARCH CASE...` prints
one JSON object per kernel. The launchers run on meta tensors with the kernels replaced by a
recorder, so what is compiled is what they would launch.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from guidekit_kernels import attention_map, tiles
from guidekit_kernels import attention_map_launch as launch

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
NAMES = ("forward_kernel", "query_kernel")
KERNELS = {name: getattr(launch, name) for name in NAMES}


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __getitem__(self, grid):
        return self

    def __call__(self, **arguments):
        self.arguments = arguments


def launched(arch, d, t, dtype, n=1024, h=8, b=2, s=4, mask=None) -> dict[str, dict]:
    """Arguments of the two launches for one shape on an architecture."""
    tiles.architecture = lambda device: 90 if arch == 90 else 80
    query = torch.empty(b, n, h, d, dtype=dtype, device="meta").transpose(1, 2)
    key = torch.empty(b, t, h, d, dtype=dtype, device="meta").transpose(1, 2)
    weights = attention_map.padded_weights(torch.empty(1, t, s, device="meta"), query)
    if mask is not None:
        mask = torch.empty(b, 1, n if mask == "rows" else 1, t, dtype=dtype, device="meta")
    bias = attention_map.padded_bias(mask, query, t)
    inputs = [query, key, key, weights, bias]
    maps = torch.empty(b, h, s, n, device="meta")
    recorders = {name: Recorder() for name in NAMES}
    for name, recorder in recorders.items():
        setattr(launch, name, recorder)
    launch.launch_forward(inputs, 0.1, query, maps)
    launch.launch_query(inputs, 0.1, query, maps, query)
    return {name: recorder.arguments for name, recorder in recorders.items()}


class Signature:
    """Types, constants and divisibility of a launch's arguments, as triton specialises them."""

    def __init__(self, kernel, arguments: dict):
        self.compile_time = {p.name for p in kernel.params if p.is_constexpr}
        self.constants, self.hints = {}, {}
        self.types = {
            name: self.typed(arguments[name], (i,), name in self.compile_time)
            for i, name in enumerate(kernel.arg_names)
        }

    def typed(self, value, path: tuple, constant: bool = False):
        if isinstance(value, tuple):
            return tuple(self.typed(part, (*path, i)) for i, part in enumerate(value))
        if constant or (type(value) is int and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            self.hints[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"


def compiled(kernel, arguments: dict, arch: int) -> dict:
    """Shared memory, registers and spilled bytes of one launch compiled for sm_<arch>."""
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    found = Signature(kernel, arguments)
    source = ASTSource(kernel, found.types, found.constants, found.hints)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return dict(shared=binary.metadata.shared, **resources(binary.asm["ptx"], arch))


def resources(ptx: str, arch: int) -> dict:
    """Registers of a thread and bytes that it spills, as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx)[1]
        command = [
            nvidia.get_ptxas(arch).path,
            "-v",
            f"--gpu-name={target}",
            str(path),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return dict(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill", report)),
        vector=len(re.findall(r"ld\.global.*\.v4|cp\.async\.c[ga]\.shared\.global", ptx)),
    )


def main() -> None:
    arch, *cases = sys.argv[1:]
    for case in cases:
        options = json.loads(case)
        options["dtype"] = getattr(torch, options["dtype"])
        for name, arguments in launched(int(arch), **options).items():
            row = compiled(KERNELS[name], arguments, int(arch))
            about = dict(case=json.loads(case), arch=int(arch), kernel=name)
            print(json.dumps(about | dict(triton=triton.__version__) | row), flush=True)


if __name__ == "__main__":
    main()
