"""Attention with maps of four keys: the kernels of guidekit_kernels against what torch offers.

    python benchmarks/attention_map.py            on a GPU: time and peak memory of every shape
    python benchmarks/attention_map.py --quick    few turns; without a GPU, small torch rivals
    python benchmarks/attention_map.py --timings kernels/timings.json    rows that the core reads

Without a GPU it prints a model in place of measurements: bytes moved, multiplications and the
time that the slower of the two takes at the rates of an H200.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import guidekit_kernels.attention_map_joint as joint
import torch
import torch.nn.functional as F
from torch import Tensor

import guidekit_kernels.attention_map as kernels
from attention_model import BANDWIDTH, CHOSEN, COLUMNS, RATE, SHAPES, Shape, modelled
from guidekit.attention.maps import token_maps
from guidekit_kernels import tiles
from memory import PeakMemory

CORE = ("fused, as the core runs it", "vendor, as the core runs it")  # what the core chooses by
# The core's name of a way to compute both, and the row it is read from: measured, modelled.
ROUTES = {
    "sdpa": ("SDPA + token_maps", "SDPA + second softmax"),
    "fused": (CORE[0], "fused"),
    "vendor": (CORE[1], "vendor + columns"),
}
AHEAD = 10_000_000  # cycles that a GPU is kept busy before a call, 5 ms


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
    columns: Tensor

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
    columns = torch.tensor(CHOSEN, device=device)
    return Inputs(*tensors, weights, mask, rows, keys, drawn(shape.n, False), maps, columns)


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
        F.pad(x.query, (0, extra)),
        F.pad(x.key, (0, extra)),
        torch.cat([x.value, columns], -1),
        attn_mask=x.mask,
        scale=d**-0.5,
    )
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


def vendor(x: Inputs) -> tuple[Tensor, Tensor]:
    """Stock kernels for the output, the chosen columns beside them."""
    return joint.attend(x.query, x.key, x.value, x.weights, x.columns, rows=x.rows)


def fused_in_core(x: Inputs) -> tuple[Tensor, Tensor]:
    """The kernels without the range of keys, which the core does not know."""
    return kernels.attend(x.query, x.key, x.value, x.weights, mask=x.mask, rows=x.rows)


METHODS = {
    "SDPA, no maps": floor,
    "eager": eager,
    "SDPA + second softmax": second_softmax,
    "SDPA + token_maps": chunked,
    "SDPA, augmented V": augmented,
    "FlexAttention + lse": flex,
    "fused": fused,
    "vendor + columns": vendor,
    CORE[0]: fused_in_core,
    CORE[1]: vendor,
}
OURS = ("fused", "vendor + columns")  # held against the rivals; the core runs without compilation


# Where compilation helps: chains of pointwise work. The other rows are one kernel each.
COMPILED = ("eager", "SDPA + second softmax", "FlexAttention + lse", "vendor + columns")


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
        torch.cuda._sleep(AHEAD)  # meanwhile Python enqueues the call: kernels are what is timed
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
        if not cuda and name in ("FlexAttention + lse", "fused", *CORE):
            continue  # no GPU for the kernels; no backward of FlexAttention on a CPU
        row = {"shape": shape.name, "method": name}
        if "vendor" in name and (shape.mask or not shape.joint):
            continue  # takes no mask; in cross-attention it would compute dK and dV for nothing
        if cuda and name in COMPILED:
            # Each for its own sizes: shared graphs become dynamic, and then are not compiled.
            torch._dynamo.reset()
            function = torch.compile(function, dynamic=False)
        try:
            maps = function(x)[1]
            row["map error"] = 0.0 if maps is None else (maps - truth).abs().max().item()
            with torch.no_grad():
                row["forward ms"] = milliseconds(lambda f=function: f(x), repeats, cuda)
            row["both ms"] = milliseconds(backward(function, x), repeats, cuda)
            with PeakMemory() as peak:
                backward(function, x)()
            row["peak MiB"] = peak.mebibytes
        except Exception as error:  # triton's are of many kinds; the other rows are worth having
            row |= {
                "map error": str(error).splitlines()[0][:60],
                "forward ms": "",
                "both ms": "",
                "peak MiB": "",
            }
        rows.append(row)
    base = rows[0]["both ms"]
    for row in rows:
        row["over floor"] = row["both ms"] / base if row["both ms"] else ""
    return rows


def timings(rows: list[dict]) -> list[dict]:
    """Rows of `kernels/timings.json`: per shape the microseconds of every route of the core."""
    cuda, found = torch.cuda.is_available(), []
    source = dict(source="model", device="H200", arch=90)
    if cuda:
        arch = tiles.architecture(torch.device("cuda"))
        source = dict(source="measured", device=torch.cuda.get_device_name(), arch=arch)
    for shape in SHAPES:
        times = {r["method"]: r for r in rows if r["shape"] == shape.name}
        us = {}
        for route, names in ROUTES.items():
            row = times.get(names[0 if cuda else 1], {})
            value = 1000 * (row.get("both ms") or 0) if cuda else row.get("model us")
            if value:
                us[route] = round(value, 2)
        sizes = dict(joint=shape.joint, h=shape.h, n=shape.n, t=shape.t, d=shape.d)
        found.append(dict(shape=shape.name, **sizes, **source, date=time.strftime("%F"), us=us))
    return found


def write_timings(path: Path, rows: list[dict]) -> None:
    """Replaces the rows of this architecture and keeps those of others."""
    new = timings(rows)
    kept = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in kept if row["arch"] != new[0]["arch"]]
    lines = ",\n".join(json.dumps(row) for row in kept + new)
    path.write_text(f"[\n{lines}\n]\n")


def goals(rows: list[dict]) -> list[str]:
    """What is asked of the kernels on an H200, shape by shape: met or missed."""
    lines = []
    for shape in SHAPES:
        found = {r["method"]: r for r in rows if r["shape"] == shape.name and r["both ms"]}
        ours = [found[m] for m in OURS if m in found]
        rivals = [r for m, r in found.items() if m not in (*OURS, *CORE, "SDPA, no maps")]
        if not (ours and rivals and "SDPA, no maps" in found):
            lines.append(f"{shape.name}: not measured")
            continue
        best, floor_row = min(ours, key=lambda r: r["both ms"]), found["SDPA, no maps"]
        gain = min(r["both ms"] for r in rivals) / best["both ms"]
        over = best["both ms"] / floor_row["both ms"]
        memory = best["peak MiB"] / floor_row["peak MiB"]
        wanted = gain >= 1 and over <= 1.25 if shape.joint else gain >= 1.5
        lines.append(
            f"{shape.name}: {best['method']} {gain:.2f} times the best rival, {over:.2f} of the "
            f"floor's time: {'met' if wanted else 'MISSED'}; {memory:.2f} of its memory: "
            f"{'met' if memory <= 1.1 else 'MISSED'}"
        )
    return lines


def end_to_end(repeats: int) -> list[str]:
    """A guided SDXL step with random weights against the CFG step, by implementation."""
    from guidekit_zest import Zest
    from overhead import Guided, fastest, random_pipeline

    pipeline = random_pipeline(True, torch.bfloat16).to("cuda")
    steps = {"CFG": Guided(pipeline, [0], [])}
    before = os.environ.get("GUIDEKIT_ATTENTION")
    for name in ("sdpa", "triton"):
        os.environ["GUIDEKIT_ATTENTION"] = name
        steps[name] = Guided(pipeline, [0], [Zest()])
    times = fastest(steps, repeats)
    os.environ.pop("GUIDEKIT_ATTENTION") if before is None else os.environ.update(
        GUIDEKIT_ATTENTION=before
    )
    return [
        f"SDXL step, {name}: {times[name] / times['CFG']:.2f} times the CFG step: "
        f"{'met' if times[name] <= 2.2 * times['CFG'] else 'MISSED'}"
        for name in ("sdpa", "triton")
    ]


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
    return replace(
        shape,
        name=f"{shape.name}, cut",
        n=n,
        t=n if shape.joint else shape.t,
        h=2,
        text=32 if shape.joint else 0,
    )


@click.command()
@click.option("--quick", is_flag=True, help="10 turns in place of 100; a CPU: cut shapes, fp32.")
@click.option("--seed", default=0, help="Of the inputs.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
@click.option(
    "--timings",
    "timings_file",
    type=click.Path(path_type=Path),
    help="Also put the rows that the core chooses by into this file.",
)
def main(quick, seed, json_file, timings_file):
    """Prints time and memory of attention with maps, or a model of them without a GPU."""
    rows = []
    cuda = torch.cuda.is_available()
    if cuda:
        rows = [
            r
            for s in SHAPES
            for r in measured(s, torch.bfloat16, "cuda", 10 if quick else 100, seed)
        ]
        print(table(rows))
        print(
            f"\nmeasured: {torch.cuda.get_device_name()}, bf16, torch {torch.__version__}, "
            f"median, cache flushed; {time.strftime('%Y-%m-%d')}\n"
        )
        print("\n".join(goals(rows) + end_to_end(3 if quick else 20)))
    else:
        rows = [r for shape in SHAPES for r in modelled(shape)]
        print(
            "MODEL, nothing measured: one layer, one image, 16 bits, at "
            f"{BANDWIDTH / 1e12} TB/s and {RATE / 1e12:.0f} TFLOP/s\n"
        )
        print(table(rows))
    if timings_file:
        write_timings(timings_file, rows)
    if quick and not cuda:
        cut = [r for s in SHAPES for r in measured(small(s), torch.float32, "cpu", 3, seed)]
        print(
            f"\nmeasured: {platform.machine()} CPU, {torch.get_num_threads()} threads, fp32, "
            "cut shapes, torch rivals only\n"
        )
        print(table(cut))
        rows += cut
    if json_file:
        with open(json_file, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
