"""Attention with maps of four keys: the kernels of guidekit_kernels against what torch offers.

    python benchmarks/attention_map.py            on a GPU: time and peak memory of every shape
    python benchmarks/attention_map.py --quick    few turns; without a GPU, small torch rivals

Without a GPU it prints a model in place of measurements: bytes moved, multiplications and the
time that the slower of the two takes at the rates of an H200.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import click
import torch
import torch.nn.functional as F
from torch import Tensor

import guidekit_kernels.attention_map as kernels
from guidekit.attention import token_maps

from memory import PeakMemory

BANDWIDTH = 4.8e12  # bytes a second of an H200
RATE = 8e14  # bf16 FLOP a second that large products reach on it, of 9.9e14 on paper
COLUMNS = 4  # maps


@dataclass(frozen=True)
class Shape:
    """Attention of one kind of layer; in joint attention, maps of the first `text` keys."""

    name: str
    layers: int
    h: int
    n: int
    t: int
    d: int
    text: int = 0
    mask: bool = False

    @property
    def joint(self) -> bool:
        return self.text > 0


SHAPES = [
    Shape("SD 1.5, 64x64", 5, 8, 4096, 77, 40),
    Shape("SD 1.5, 32x32", 5, 8, 1024, 77, 80),
    Shape("SD 1.5, 16x16", 5, 8, 256, 77, 160),
    Shape("SDXL, 64x64", 10, 10, 4096, 77, 64),
    Shape("SDXL, 32x32", 60, 20, 1024, 77, 64),
    Shape("PixArt, 64x64", 28, 16, 4096, 300, 72, mask=True),
    Shape("SD 1.5, 128x128", 5, 8, 16384, 77, 40),
    Shape("SD 3 medium", 24, 24, 4096 + 333, 4096 + 333, 64, text=333),
    Shape("Flux", 57, 24, 4096 + 512, 4096 + 512, 128, text=512),
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
    keys: slice
    grad_out: Tensor
    grad_maps: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.query, self.key, self.value) if x.requires_grad]


def inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """One image. A frozen backbone's text keys need no gradient, those of joint attention do."""
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(n: int, grad: bool) -> Tensor:
        x = torch.randn(1, n, shape.h, shape.d, generator=generator, device=device).to(dtype)
        return x.transpose(1, 2).requires_grad_(grad)

    weights = torch.zeros(1, shape.t, COLUMNS, device=device)
    weights[0, 1, 0] = weights[0, 2, 1] = weights[0, 3, 2] = 1
    weights[0, 4:7, 3] = 1 / 3
    mask = None
    if shape.mask:  # PixArt's padding
        mask = torch.zeros(1, 1, 1, shape.t, dtype=dtype, device=device)
        mask[..., shape.t // 2 :] = -10000.0
    tensors = drawn(shape.n, True), drawn(shape.t, shape.joint), drawn(shape.t, shape.joint)
    rows, keys = slice(shape.text, None), slice(0, shape.text or shape.t)
    maps = torch.randn(1, COLUMNS, shape.n - shape.text, generator=generator, device=device)
    return Inputs(*tensors, weights, mask, rows, keys, drawn(shape.n, False), maps)


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
    """SDPA for the output, and P once more for the maps."""
    logits = x.query[:, :, x.rows] @ x.key.transpose(-1, -2) * x.query.shape[-1] ** -0.5
    p = (logits if x.mask is None else logits + x.mask).softmax(-1)
    return floor(x)[0], (p.mean(1).float() @ x.weights).transpose(-1, -2)


def chunked(x: Inputs) -> tuple[Tensor, Tensor]:
    """SDPA and guidekit's `token_maps`, which keeps the log-sum-exp: the half-precision sdpa."""
    return floor(x)[0], token_maps(x.query, x.key, x.weights, x.mask, rows=x.rows)


def augmented(x: Inputs) -> tuple[Tensor, Tensor]:
    """SDPA with the weights as further columns of V."""
    d, extra = x.query.shape[-1], -COLUMNS % 8 + COLUMNS
    columns = F.pad(x.weights.to(x.value.dtype), (0, extra - COLUMNS))[:, None]
    columns = columns.expand(*x.value.shape[:3], extra)
    both = F.scaled_dot_product_attention(
        F.pad(x.query, (0, extra)), F.pad(x.key, (0, extra)), torch.cat([x.value, columns], -1),
        attn_mask=x.mask, scale=d**-0.5,
    )  # fmt: skip
    return both[..., :d], both[:, :, x.rows, d : d + COLUMNS].mean(1).float().transpose(-1, -2)


def flex(x: Inputs) -> tuple[Tensor, Tensor]:
    """FlexAttention with its log-sum-exp, and P of the first seven keys from it (compiled)."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    change = None
    if x.mask is not None:
        vector = x.mask[0, 0, 0]
        change = lambda score, b, h, n, t: score + vector[t]  # noqa: E731
    out, aux = flex_attention(x.query, x.key, x.value, change, return_aux=AuxRequest(lse=True))
    few = x.key[:, :, :7].float()  # the weighted keys; what knows them can do with so little
    logits = x.query[:, :, x.rows].float() @ few.transpose(-1, -2) * x.query.shape[-1] ** -0.5
    p = torch.exp(logits - aux.lse[:, :, x.rows, None])
    return out, (p.mean(1) @ x.weights[:, :7]).transpose(-1, -2)


def fused(x: Inputs) -> tuple[Tensor, Tensor]:
    """The kernels."""
    return kernels.attend(x.query, x.key, x.value, x.weights, mask=x.mask, rows=x.rows, keys=x.keys)


METHODS = {
    "SDPA, no maps": floor, "eager": eager, "SDPA + second softmax": second_softmax,
    "SDPA + token_maps": chunked, "SDPA, augmented V": augmented, "FlexAttention + lse": flex,
    "fused": fused,
}  # fmt: skip


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
    if not cuda:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in marks:
        flush.zero_()
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in marks)


def measured(shape: Shape, dtype: torch.dtype, device: str, repeats: int, seed: int) -> list[dict]:
    """A row per method: time, memory, and the largest difference of its maps from fp32's."""
    x, cuda, rows = inputs(shape, dtype, device, seed), device == "cuda", []
    truth = token_maps(x.query, x.key, x.weights, x.mask, rows=x.rows).detach()
    for name, function in METHODS.items():
        if not cuda and name in ("FlexAttention + lse", "fused"):
            continue  # no backward on a CPU; no GPU for the kernels
        row = {"shape": shape.name, "method": name}
        if cuda and name in ("eager", "SDPA + second softmax", "FlexAttention + lse"):
            function = torch.compile(function)
        try:
            maps = function(x)[1]
            row["map error"] = 0.0 if maps is None else (maps - truth).abs().max().item()
            with torch.no_grad():
                row["forward ms"] = milliseconds(lambda f=function: f(x), repeats, cuda)
            row["both ms"] = milliseconds(backward(function, x), repeats, cuda)
            with PeakMemory() as peak:
                backward(function, x)()
            row["peak MiB"] = peak.mebibytes
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row |= {"map error": str(error).splitlines()[0][:60], "forward ms": "", "both ms": "",
                    "peak MiB": ""}  # fmt: skip
        rows.append(row)
    base = rows[0]["both ms"]
    for row in rows:
        row["over floor"] = row["both ms"] / base if row["both ms"] else ""
    return rows


def modelled(shape: Shape) -> list[dict]:
    """A row per method: megabytes, GFLOP and the roofline time of one layer. A model.

    16-bit tensors; P of eager methods in 16 bits, each pass over it counted; a product with P has
    2 H N T d FLOP. Stock backward kernels always compute dQ, dK and dV (five products of this
    size), ours dQ alone (three) in cross-attention, and in joint attention dQ and dK/dV (three
    and four, P and dP twice). Launches are not counted, and every product runs at one rate: a
    kernel that pads its head size is slower than its row (flash attention runs 72 as 96 and 136 as
    160, ours 40 as 64 and 72 or 80 as 128).
    """
    p, q, k = shape.h * shape.n * shape.t, shape.h * shape.n * shape.d, shape.h * shape.t * shape.d
    d, both = shape.d, 1 + shape.joint
    seen = shape.h * (shape.n - shape.text) * (shape.text or shape.t)  # part of P that maps read
    maps, small = 4 * shape.h * shape.n * COLUMNS, 3 * 2 * 16 * seen
    wide, one = (d + 8) / d, shape.t <= 128 and d <= 128  # one block of keys in backward
    stored = 2 * q + 4 * k if shape.joint else 2 * q + 2 * k  # gradients written, tensors read
    forward = {  # bytes, FLOP
        "SDPA, no maps": (4 * q + 4 * k, 4 * p * d),
        "eager": (4 * q + 4 * k + 10 * p, 4 * p * d + 2 * p),
        "SDPA + second softmax": (6 * q + 6 * k + 8 * p, 6 * p * d),
        "SDPA, augmented V": (wide * (8 * q + 10 * k) + maps, 4 * p * (d + 8)),
        "FlexAttention + lse": (6 * q + 4 * k + 4 * maps, 4 * p * d),
        "fused": (4 * q + 4 * k + maps, 4 * p * d + small),
    }
    back = {
        "SDPA, no maps": (6 * q + 4 * k + stored, 10 * p * d),
        "eager": (6 * q + 4 * k + stored + 12 * p, both * 4 * p * d),
        "SDPA + second softmax": (8 * q + 8 * k + 2 * stored + 10 * p, (10 + 2 * both) * p * d),
        "SDPA, augmented V": (wide * (10 * q + 8 * k + 2 * stored), 10 * p * (d + 8)),
        "FlexAttention + lse": (10 * q + 4 * k + stored + 8 * maps, 14 * p * d),
        "fused": (
            (4 if one else 6) * q + 4 * k + stored + maps + shape.joint * (4 * q + 4 * k),
            (14 if shape.joint else 6) * p * d + both * small,
        ),
    }
    rows = []
    for name in forward:
        (fb, ff), (bb, bf) = forward[name], back[name]
        roof = max(fb / BANDWIDTH, ff / RATE) + max(bb / BANDWIDTH, bf / RATE)
        rows.append({
            "shape": shape.name, "method": name, "forward MB": fb / 1e6, "forward GFLOP": ff / 1e9,
            "backward MB": bb / 1e6, "backward GFLOP": bf / 1e9, "model us": 1e6 * roof,
            "all layers, model ms": 1e3 * shape.layers * roof,
        })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def small(shape: Shape) -> Shape:
    """A shape that a CPU core runs in milliseconds."""
    n = min(shape.n, 1024) if not shape.joint else 256 + 32
    return replace(shape, name=f"{shape.name}, cut", n=n, t=n if shape.joint else shape.t, h=2,
                   text=32 if shape.joint else 0)  # fmt: skip


@click.command()
@click.option("--quick", is_flag=True, help="10 turns in place of 100; a CPU: cut shapes, fp32.")
@click.option("--seed", default=0, help="Of the inputs.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
def main(quick, seed, json_file):
    """Prints time and memory of attention with maps, or a model of them without a GPU."""
    rows = []
    cuda = torch.cuda.is_available()
    if cuda:
        rows = [r for s in SHAPES for r in measured(s, torch.bfloat16, "cuda", 10 if quick else 100,
                                                    seed)]  # fmt: skip
        print(table(rows))
        print(f"\nmeasured: {torch.cuda.get_device_name()}, bf16, torch {torch.__version__}, "
              f"median, cache flushed; {time.strftime('%Y-%m-%d')}")  # fmt: skip
    else:
        rows = [r for shape in SHAPES for r in modelled(shape)]
        print("MODEL, nothing measured: one layer, one image, 16 bits, at "
              f"{BANDWIDTH / 1e12} TB/s and {RATE / 1e12:.0f} TFLOP/s\n")  # fmt: skip
        print(table(rows))
    if quick and not cuda:
        cut = [r for s in SHAPES for r in measured(small(s), torch.float32, "cpu", 3, seed)]
        print(f"\nmeasured: {platform.machine()} CPU, {torch.get_num_threads()} threads, fp32, "
              "cut shapes, torch rivals only\n")  # fmt: skip
        print(table(cut))
        rows += cut
    if json_file:
        with open(json_file, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
