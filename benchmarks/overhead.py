"""Cost of guidance: time, launches, host reads and saved activations of one step, interleaved.

    python benchmarks/overhead.py            the built-in model, batch 1 and 4, 1 and all threads
    python benchmarks/overhead.py --compile  the same with a compiled denoiser
    python benchmarks/overhead.py --full     Stable Diffusion 1.5's configuration, random weights
    python benchmarks/overhead.py --peak     one guided step of it and of SDXL's, peak memory

"plain" is Zest as public code has it (plain_zest.py). Launches are the operations that compute
something, in a step without its scheduler's; host reads are numbers of tensors that Python waits
for, on a CPU also of those that live there by design.
"""

import contextlib
import os
import platform
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import guidekit
from full_size import random_pipeline
from guidekit import Condition
from guidekit_pag import PerturbedAttention
from guidekit_pww import PaintWithWords
from guidekit_seg import SmoothedEnergy
from guidekit_zest import Zest
from measured import Results
from memory import PeakMemory
from plain_zest import CFG, CONDITION, PROMPT, Plain


class Guided:
    """The first step of a fresh run of guidekit."""

    def __init__(self, pipeline, seeds: list[int], guidances: list, **options):
        self.sampling = guidekit.sample(
            pipeline, CONDITION, guidances, seeds=seeds, steps=50, cfg=CFG, **options
        )
        self.timestep = self.sampling.run.scheduler.timesteps[0]
        self.z = self.sampling._start()

    def __enter__(self) -> None:
        """What a run does once, before its steps."""
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(guidekit.backbones.denoiser.frozen(*self.sampling.denoiser.models))
        self.stack.enter_context(self.sampling.engine.opened())

    def __exit__(self, *error) -> None:
        self.stack.close()

    def __call__(self) -> Tensor:
        """The prediction."""
        return self.sampling.engine.predict(self.z, self.timestep, 0, 50).prediction


def fastest(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Minimum seconds of each function, called in turns."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats + 1):  # the first turn warms up
        for name, function in functions.items():
            with prepared(function):
                start = time.perf_counter()
                function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            best[name] = min(best[name], seconds)
    return best


def prepared(function: Callable) -> contextlib.AbstractContextManager:
    """What a step needs set up before the clock starts."""
    return function if hasattr(function, "__enter__") else contextlib.nullcontext()


def saved_mebibytes(function: Callable, model: torch.nn.Module) -> float:
    """Storage that autograd keeps for backward while a function runs, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = max(seen.get(storage.data_ptr(), 0), storage.nbytes())
        kept.append(tensor)  # so that no address is used twice
        return tensor

    kept: list[Tensor] = []
    unpack = lambda tensor: tensor  # noqa: E731
    with prepared(function), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        function()
    return sum(seen.values()) / 2**20


# Operations that compute nothing: views, and questions.
VIEWS = {
    *("alias", "as_strided", "chunk", "detach", "diagonal", "expand", "lift_fresh", "permute"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind"),
    *("unsqueeze", "view", "_reshape_alias", "_unsafe_view", "_local_scalar_dense"),
    *("empty", "empty_like", "empty_strided", "new_empty", "promote_types"),
}
READS = {"item", "cpu", "tolist", "numpy", "nonzero"}
READS |= {"__bool__", "__int__", "__float__", "__index__"}


class Launches(TorchDispatchMode):
    """Counts operations that launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Counts numbers that Python asks of tensors."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


def counted(function: Callable, mode: type) -> int:
    """What a mode counts while a function runs."""
    with prepared(function), mode() as found:
        function()
    return found.count


def step_rows(pipeline, batch: int, repeats: int, count: bool = True) -> list[dict]:
    """CFG step, edited steps, guided steps and the plain rival; counts where they are asked for."""
    seeds = list(range(batch))
    step = lambda *guidances, **options: Guided(pipeline, seeds, guidances, **options)  # noqa: E731
    zest = Zest(stop=1.0)
    functions = {
        "CFG step": step(),
        "pww": step(PaintWithWords()),
        "pag": step(PerturbedAttention()),
        "pww + pag + seg": step(PaintWithWords(), PerturbedAttention(), SmoothedEnergy()),
        "Zest": step(zest),
        "Zest, batched": step(zest, calls={"null+cond*": "batched"}),
        "Zest, split": step(zest, calls={"null+cond*": "split"}),
        "Zest, memory low": step(zest, memory="low"),
        "plain Zest": Plain(pipeline, batch, seeds),
    }
    if not count:
        functions.pop("plain Zest")  # its processors are no part of a compiled denoiser
    seconds = fastest(functions, repeats)
    plain = seconds.get("plain Zest", float("nan"))
    rows = []
    for name, function in functions.items():
        row = {
            "method": name,
            "batch": batch,
            "threads": torch.get_num_threads(),
            "ms": 1000 * seconds[name],
            "over CFG": seconds[name] / seconds["CFG step"],
            "plain over it": plain / seconds[name],
        }
        if count:
            row |= {
                "launches": counted(function, Launches),
                "host reads": counted(function, HostReads),
                "saved MiB": saved_mebibytes(function, pipeline.unet),
            }
        rows.append(row)
    if count:
        for name in ("CFG step", "plain Zest"):
            own = next(row["launches"] for row in rows if row["method"] == name)
            for row in rows:
                row[f"launches over {name}"] = row["launches"] / own
    chosen = functions["Zest"].sampling.account.calls
    print(f"batch {batch}, {torch.get_num_threads()} threads: measured {chosen}")
    return rows


def pipeline_rows(pipeline, repeats: int, steps: int = 20) -> list[dict]:
    """A whole run without plugin beside the bare pipeline's, with the calls of the denoiser."""
    calls = {"n": 0}
    handle = pipeline.unet.register_forward_pre_hook(lambda *_: calls.update(n=calls["n"] + 1))
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    functions = {
        "bare pipeline": lambda: (
            pipeline(
                [PROMPT] * 4,
                num_inference_steps=steps,
                guidance_scale=CFG,
                generator=generators(),
                output_type="pt",
            ).images
        ),
        "guidekit, no plugin": lambda: (
            guidekit.sample(pipeline, Condition(PROMPT), seeds=range(4), steps=steps, cfg=CFG)
            .finish()
            .images
        ),
    }
    counts = {}
    images = {}
    for name, function in functions.items():
        calls["n"] = 0
        images[name] = function()
        counts[name] = calls["n"]
    handle.remove()
    assert torch.equal(*images.values()), "the images differ"
    seconds = fastest(functions, repeats)
    return [
        {
            "method": name,
            "batch": 4,
            "ms": 1000 * seconds[name],
            "over bare": seconds[name] / seconds["bare pipeline"],
            "denoiser calls": counts[name],
        }
        for name in functions
    ]


def peak_row(xl: bool, dtype: torch.dtype) -> dict:
    """One guided step of a full-size model: seconds and peak memory, weights included."""
    with PeakMemory() as peak:
        pipeline = random_pipeline(xl, dtype)
        step = Guided(pipeline, [0], [Zest(stop=1.0)], memory="low")
        start = time.perf_counter()
        with step:
            finite = bool(torch.isfinite(step()).all())
    seconds = time.perf_counter() - start
    return {
        "method": f"{'SDXL' if xl else 'SD 1.5'}, Zest step, memory low",
        "batch": 1,
        "s": seconds,
        "peak GiB with weights": peak.mebibytes / 1024,
        "finite": str(finite),
    }


def table(rows: list[dict]) -> str:
    """Rows of one kind as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--model", default="scenes", show_default=True, help="Built-in, directory or hub id.")
@click.option("--full", is_flag=True, help="Stable Diffusion 1.5's configuration, random weights.")
@click.option("--peak", is_flag=True, help="Peak memory of full-size SD 1.5 and SDXL (bfloat16).")
@click.option("--repeats", default=0, help="Turns of which the fastest counts; 20, full size 3.")
@click.option("--quick", is_flag=True, help="5 turns.")
@click.option("--threads", multiple=True, type=int, help="Of torch; by default 1 and all cores.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the denoiser; nothing counted.")
@click.option("--seed", default=0, help="Of random weights.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
def main(model, full, peak, repeats, quick, threads, compiled, seed, json_file):
    """Prints what guidance costs."""
    torch.manual_seed(seed)
    threads = threads or sorted({1, os.cpu_count()})
    repeats = 1 if peak else repeats or (5 if quick else 3 if full else 20)
    if peak:
        tables = [[peak_row(False, torch.float32), peak_row(True, torch.bfloat16)]]
    else:
        pipeline = random_pipeline(False, torch.float32) if full else guidekit.load(model)
        if torch.cuda.is_available():
            pipeline.to("cuda")
        if compiled:
            pipeline.unet.compile()
        batches = (1,) if full else (1, 4)
        tables = [] if full or compiled else [pipeline_rows(pipeline, repeats)]
        for number in threads:
            torch.set_num_threads(number)
            tables += [step_rows(pipeline, batch, repeats, not compiled) for batch in batches]
    results = Results(json_file, model=model, repeats=repeats, seed=seed)
    results.extend(row for rows in tables for row in rows)
    results.finish()
    for rows in tables:
        print(table(rows), end="\n\n")
    print(
        f"minimum of {repeats}, interleaved; {os.cpu_count()} {platform.machine()} cores, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
