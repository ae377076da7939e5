"""Guided steps of Stable Diffusion's sizes with random weights, on a GPU: time and peak memory.

    python benchmarks/guided_steps.py --model sd15             eager, batch 1 and 4
    python benchmarks/guided_steps.py --model sdxl --compile   CUDA graphs of the compiled denoiser
    python benchmarks/guided_steps.py --model tiny-sd15        the same code on a CPU

One step of classifier-free guidance, of Paint-with-Words, PAG and Zest, and of Zest as public code
has it (plain_zest.py: eager attention that stores every map, one batch with a graph through it).
"""

import statistics
import time
from collections.abc import Callable

import click
import torch

from full_size import random_pipeline
from guidekit_pag import PerturbedAttention
from guidekit_pww import PaintWithWords
from guidekit_zest import Zest
from measured import Results
from memory import PeakMemory
from overhead import Guided, prepared
from plain_zest import Plain

TINY = dict(sample_size=16, layers_per_block=1)
TINY_SD15 = TINY | dict(block_out_channels=(32, 32, 32, 32), attention_head_dim=4)
TINY_SDXL = TINY | dict(
    block_out_channels=(32, 32, 32), transformer_layers_per_block=1, attention_head_dim=2
)
MODELS = {
    "sd15": (False, {}),
    "sdxl": (True, {}),
    "tiny-sd15": (False, TINY_SD15),
    "tiny-sdxl": (True, TINY_SDXL),
}
GUIDANCES: dict[str, Callable[[], list]] = {
    "CFG": list,
    "Zest": lambda: [Zest(stop=1.0)],
    "pww": lambda: [PaintWithWords()],
    "pag": lambda: [PerturbedAttention()],
}


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable, repeats: int) -> dict:
    """Milliseconds of a step, median and least, after two that warm up; then its peak memory."""
    times, finite = [], True
    with prepared(step):
        for _ in range(repeats + 2):
            synchronise()
            torch.compiler.cudagraph_mark_step_begin()
            start = time.perf_counter()
            result = step()
            synchronise()
            times.append(1000 * (time.perf_counter() - start))
        finite = bool(torch.isfinite(result).all())
        torch.compiler.cudagraph_mark_step_begin()
        with PeakMemory() as peak:
            step()
            synchronise()
    kept = times[2:]
    return {
        "ms": statistics.median(kept),
        "least ms": min(kept),
        "first ms": times[0],
        "peak MiB": peak.mebibytes,
        "finite": finite,
    }


def steps(pipeline, batch: int, compiled: bool) -> dict[str, Callable[[], Callable]]:
    """Name to what makes the step; plain code's processors are no part of a compiled denoiser."""
    seeds = list(range(batch))
    made: dict[str, Callable[[], Callable]] = {
        name: lambda guidances=guidances: Guided(pipeline, seeds, guidances())
        for name, guidances in GUIDANCES.items()
    }
    if not compiled:
        made["plain Zest"] = lambda: Plain(pipeline, batch, seeds)
    return made


def compile_denoiser(pipeline, how: str) -> None:
    """Compiles the UNet: by inductor with CUDA graphs, or by another backend's name alone."""
    if how == "inductor":
        pipeline.unet.compile(mode="reduce-overhead")
    else:
        pipeline.unet.compile(backend=how)


def rows(pipeline, batch: int, compiled: str | None, repeats: int, only: tuple[str, ...]):
    """A row per step; what fails says why, and the others are worth having."""
    base = None
    for name, make in steps(pipeline, batch, compiled is not None).items():
        if only and name not in only:
            continue
        row = {"step": name, "batch": batch, "compiled": compiled}
        try:
            row |= timed(make(), repeats)
        except Exception as error:  # of compilers, of memory
            yield row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        base = row["ms"] if name == "CFG" else base
        yield row | {"over CFG": row["ms"] / base if base else None}


@click.command()
@click.option("--model", type=click.Choice(list(MODELS)), default="sd15", show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, help="1 and 4 unless named.")
@click.option("--compile", "compiled", flag_value="inductor", help="Inductor with CUDA graphs.")
@click.option("--backend", "compiled", help="Another backend: cudagraphs, aot_eager.")
@click.option("--only", multiple=True, help="Of CFG, Zest, pww, pag, plain Zest.")
@click.option("--repeats", default=10, show_default=True, help="Steps of which the median counts.")
@click.option("--quick", is_flag=True, help="3 steps.")
@click.option("--seed", default=0, help="Of the random weights.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
def main(model, batches, compiled, only, repeats, quick, seed, json_file):
    """Prints what a guided step costs, a JSON object a row."""
    torch.manual_seed(seed)
    xl, changes = MODELS[model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = Results(json_file, model=model, dtype="bfloat16", repeats=repeats)
    pipeline = random_pipeline(xl, torch.bfloat16, device, **changes)
    if compiled:
        compile_denoiser(pipeline, compiled)
    for batch in batches or (1, 4):
        for row in rows(pipeline, batch, compiled, 3 if quick else repeats, only):
            results.add(row)
    results.finish()


if __name__ == "__main__":
    main()
