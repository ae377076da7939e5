"""Attention with maps of four keys at the shapes of real denoisers: time, memory, map error.

    python benchmarks/attention_map.py            one layer, one image, forward and backward
    python benchmarks/attention_map.py --quick    few turns
    python benchmarks/attention_map.py --tiny     cut shapes, for a CPU
    python benchmarks/attention_map.py --timings kernels/guidekit_kernels/timings.json
                                                  rows that the core chooses by (on a GPU)

Also the digits of the maps (`attention_digits`), and which of torch's backends take the weights
beside V, with queries and keys padded to that width, as the core does, and not padded.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_digits import DTYPES, STDS
from attention_digits import row as digits
from guidekit.attention.call import AttentionCall, attend
from guidekit.attention.maps import token_maps
from measured import Results
from memory import PeakMemory

AHEAD = 10_000_000  # cycles that a GPU is kept busy before a call, 5 ms
MAPS = 4


@dataclass(frozen=True)
class Shape:
    """Attention of one kind of layer; in joint attention, maps of the first `text` keys."""

    name: str
    h: int
    n: int
    t: int
    d: int
    text: int = 0
    mask: bool = False


SHAPES = [
    Shape("SD 1.5, 64x64", 8, 4096, 77, 40),
    Shape("SD 1.5, 32x32", 8, 1024, 77, 80),
    Shape("SD 1.5, 16x16", 8, 256, 77, 160),
    Shape("SDXL, 64x64", 10, 4096, 77, 64),
    Shape("SDXL, 32x32", 20, 1024, 77, 64),
    Shape("PixArt, 64x64", 16, 4096, 300, 72, mask=True),
    Shape("SD 3 medium", 24, 4096 + 333, 4096 + 333, 64, text=333),
    Shape("Flux", 24, 4096 + 512, 4096 + 512, 128, text=512),
]


@dataclass
class Inputs:
    """Tensors of one call and the gradients that come back."""

    query: Tensor
    key: Tensor
    value: Tensor
    weights: Tensor
    mask: Tensor | None
    rows: slice
    grad_out: Tensor
    grad_maps: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.query, self.key, self.value) if x.requires_grad]

    def call(self) -> AttentionCall:
        """The call as the core sees it."""
        return AttentionCall("", None, 0, self.query, self.key, self.value, self.mask)


def inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """One image. A frozen backbone's text keys need no gradient, those of joint attention do."""
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(n: int, grad: bool) -> Tensor:
        x = torch.randn(1, n, shape.h, shape.d, generator=generator, device=device).to(dtype)
        return x.transpose(1, 2).requires_grad_(grad)

    weights = torch.zeros(1, shape.t, MAPS, device=device)
    weights[0, 1, 0] = weights[0, 2, 1] = weights[0, 3, 2] = 1
    weights[0, 4:7, 3] = 1 / 3
    mask = None
    if shape.mask:  # PixArt's padding
        mask = torch.zeros(1, 1, 1, shape.t, dtype=dtype, device=device)
        mask[..., shape.t // 2 :] = -10000.0
    joint = shape.text > 0
    tensors = drawn(shape.n, True), drawn(shape.t, joint), drawn(shape.t, joint)
    maps = torch.randn(1, MAPS, shape.n - shape.text, generator=generator, device=device)
    return Inputs(*tensors, weights, mask, slice(shape.text, None), drawn(shape.n, False), maps)


def floor(x: Inputs) -> tuple[Tensor, None]:
    """SDPA alone: no maps."""
    return F.scaled_dot_product_attention(x.query, x.key, x.value, attn_mask=x.mask), None


def eager(x: Inputs) -> tuple[Tensor, Tensor]:
    """P in the dtype of the inputs, kept by autograd, as diffusers' eager processor has it."""
    logits = x.query @ x.key.transpose(-1, -2) * x.query.shape[-1] ** -0.5
    p = (logits if x.mask is None else logits + x.mask).softmax(-1)
    maps = (p[:, :, x.rows].mean(1).float() @ x.weights).transpose(-1, -2)
    return p @ x.value, maps


def second_softmax(x: Inputs) -> tuple[Tensor, Tensor]:
    """SDPA, and P once more for the maps in fp32, which keeps the log-sum-exp alone."""
    return floor(x)[0], token_maps(x.query, x.key, x.weights, x.mask, rows=x.rows)


def augmented(x: Inputs) -> tuple[Tensor, Tensor]:
    """The core's `sdpa`: the weights as further columns of V."""
    return attend(x.call(), x.weights, "sdpa", x.rows)


def kernel(x: Inputs) -> tuple[Tensor, Tensor]:
    """The core's `triton`; raises where the core would take sdpa."""
    call = x.call()
    results = attend(call, x.weights, "triton", x.rows)
    if call.implementation != "triton":
        raise ValueError("not for the kernel")
    return results


METHODS = {
    "SDPA, no maps": floor,
    "eager": eager,
    "second softmax": second_softmax,
    "augmented V": augmented,
    "kernel": kernel,
}


def backward(function: Callable, x: Inputs) -> Callable[[], None]:
    """A function that runs forward and backward."""

    def step() -> None:
        results = [r for r in function(x) if r is not None]
        torch.autograd.grad(results, x.leaves, [x.grad_out, x.grad_maps][: len(results)])

    return step


def milliseconds(function: Callable, repeats: int, cuda: bool) -> float:
    """Median time after three calls; on a GPU by events, with the cache flushed in between."""
    for _ in range(3 if cuda else 1):
        function()
    return statistics.median(_by_events(function, repeats) if cuda else _clocked(function, repeats))


def _clocked(function: Callable, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return times


def _by_events(function: Callable, repeats: int) -> list[float]:
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in marks:
        flush.zero_()
        torch.cuda._sleep(AHEAD)  # meanwhile Python enqueues the call: kernels are what is timed
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in marks]


def measured(shape: Shape, dtype: torch.dtype, device: str, repeats: int, seed: int):
    """A row per method: time, memory, and the difference of its maps from fp32's, by norms."""
    x, cuda, base = inputs(shape, dtype, device, seed), device == "cuda", None
    truth = token_maps(x.query.float(), x.key.float(), x.weights, x.mask, rows=x.rows).detach()
    for name, function in METHODS.items():
        row = {"shape": shape.name, "method": name}
        try:
            maps = function(x)[1]
            with torch.no_grad():
                row["forward ms"] = milliseconds(lambda f=function: f(x), repeats, cuda)
            row["both ms"] = milliseconds(backward(function, x), repeats, cuda)
            with PeakMemory() as peak:
                backward(function, x)()
        except Exception as error:  # triton's are of many kinds; the other rows are worth having
            yield row | {"failed": str(error).splitlines()[0][:200]}
            continue
        base = base or row["both ms"]
        error = None if maps is None else ((maps.detach() - truth).norm() / truth.norm()).item()
        yield row | {
            "over floor": row["both ms"] / base,
            "peak MiB": peak.mebibytes,
            "map error": error,
        }


BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def accepted(shape: Shape, dtype: torch.dtype, device: str, seed: int):
    """A row per backend and width of queries: whether it runs V with eight columns more."""
    x = inputs(shape, dtype, device, seed)
    value = F.pad(x.value, (0, 8))
    for backend in BACKENDS:
        for padding in (8, 0):
            query, key = F.pad(x.query, (0, padding)), F.pad(x.key, (0, padding))
            row = {"shape": shape.name, "backend": backend.name, "queries padded": bool(padding)}
            try:
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(query, key, value, attn_mask=x.mask)
                out.float().sum().backward()
                yield row | {"runs": True}
            except RuntimeError as error:
                yield row | {"runs": False, "says": str(error).splitlines()[0][:200]}


def timings(results: Results, shapes: list[Shape]) -> list[dict]:
    """Rows of `timings.json`: microseconds of the core's two ways, where both ran."""
    names, kept = {"sdpa": "augmented V", "kernel": "kernel"}, []
    facts = {key: results.facts[key] for key in ("device", "capability", "torch", "triton", "date")}
    for shape in shapes:
        rows = {r.get("method"): r for r in results.rows if r.get("shape") == shape.name}
        times = {way: rows.get(name, {}).get("both ms") for way, name in names.items()}
        if all(times.values()):
            us = {way: round(1000 * ms, 2) for way, ms in times.items()}
            sizes = dict(h=shape.h, n=shape.n, t=shape.t, d=shape.d)
            kept.append(dict(shape=shape.name, **sizes, **facts, us=us))
    return kept


def write_timings(path: Path, new: list[dict], capability: list | tuple) -> None:
    """Replaces the rows of a compute capability and keeps those of others."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [row for row in rows if list(row["capability"]) != list(capability)] + new
    path.write_text("[" + ",\n".join(json.dumps(row) for row in rows) + "]\n")


def small(shape: Shape) -> Shape:
    """A shape that a CPU core runs in milliseconds."""
    if shape.text:
        return replace(shape, n=48, t=48, h=2, text=16)
    return replace(shape, n=64, h=2)


@click.command()
@click.option("--quick", is_flag=True, help="10 turns in place of 50.")
@click.option("--tiny", is_flag=True, help="Cut shapes and 2 turns.")
@click.option("--seed", default=0, help="Of the inputs.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
@click.option(
    "--timings",
    "timings_file",
    type=click.Path(path_type=Path),
    help="Also put the rows that the core chooses by into this file; needs a GPU.",
)
def main(quick, tiny, seed, json_file, timings_file):
    """Prints time, memory and map error of attention with maps, a JSON object a row."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    if timings_file and not cuda:
        raise click.UsageError("--timings needs a GPU")
    shapes = [small(shape) for shape in SHAPES] if tiny else SHAPES
    repeats = 2 if tiny else 10 if quick else 50
    results = Results(json_file, dtype=str(dtype)[6:], repeats=repeats)
    for shape in shapes:
        for row in measured(shape, dtype, device, repeats, seed):
            results.add(row)
        for row in accepted(shape, dtype, device, seed):
            results.add(row)
    for half in DTYPES:
        for std in STDS:
            results.add(digits(std, half, 64 if tiny else 1024, device, seed))
    results.finish()
    if timings_file:
        write_timings(timings_file, timings(results, shapes), results.facts["capability"])


if __name__ == "__main__":
    main()
