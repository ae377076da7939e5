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
    torch.uint8: "*u8",
}
KERNELS = dict(forward=launch.forward_kernel, query=launch.query_kernel, key=launch.key_kernel)


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __getitem__(self, grid):
        return self

    def __call__(self, **arguments):
        self.arguments = arguments


def launched(arch, d, t, dtype, n=1024, h=8, mask=None, bias=False, keys=True) -> dict[str, dict]:
    """Arguments of the forward, dQ and (`keys`) dK/dV launches for one shape on an architecture."""
    tiles.architecture = lambda device: 90 if arch == 90 else 80
    tiles.processors = lambda device: 132
    query = torch.empty(1, n, h, d, dtype=dtype, device="meta").transpose(1, 2)
    key = torch.empty(1, t, h, d, dtype=dtype, device="meta").transpose(1, 2)
    weights = torch.empty(1, t, 4, device="meta")
    segments = torch.empty(1, 3, n, device="meta") if bias else None
    words = torch.empty(1, t, 3, device="meta") if bias else None
    if mask is not None:
        mask = torch.empty(1, 1, n if mask == "rows" else 1, t, dtype=dtype, device="meta")
    tensors = [query, key, key, weights, mask, segments, words]
    given = dict(scale=0.1, row_start=0, row_stop=n, key_start=0, key_stop=t, mean=True)
    recorders = {name: Recorder() for name in KERNELS}
    launch.forward_kernel, launch.query_kernel = recorders["forward"], recorders["query"]
    launch.key_kernel = recorders["key"]
    results = attention_map.forward_results(query, key, weights, mask, n, True, True)
    launch.launch_forward(tensors, given, results)
    saved = results if results[2].numel() else (None, None, None)
    grads = [torch.empty_like(query), torch.empty_like(results[1])]
    launch.launch_backward(tensors, given, grads, saved, keys)
    return {name: r.arguments for name, r in recorders.items() if hasattr(r, "arguments")}


def compiled(kernel, arguments: dict, arch: int) -> dict:
    """Shared memory, registers and spilled bytes of one launch compiled for sm_<arch>."""
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    compile_time = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in compile_time or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], hints[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
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
