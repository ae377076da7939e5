"""What a training step of Semantica's full-size models costs: memory on a CPU, speed on a GPU."""

import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from guidekit.semantica.model import VARIANTS, UViT, variant
from guidekit.semantica.schedule import epsilon_loss, logsnr, noised
from guidekit.semantica.train import SemanticaOptions, SemanticaTask
from guidekit.train.loop import Loop, Options
from memory import PeakMemory

TOKENS = 257  # of DINOv2 at 224x224


WARM, TIMED = 10, 30  # steps, the first of which compiles
# On a GPU of 80 GB and more; the sizes at which nothing has to be computed twice.
BATCHES = {"a": 64, "b": 32, "c": 32, "tiny": 4}


def training_step(model: UViT, optimizer: torch.optim.Optimizer) -> float:
    """One step on one image of noise; returns the loss."""
    side = model.config.sample_size
    x0, eps = torch.randn(2, 1, 3, side, side)
    states = torch.randn(1, TOKENS, model.config.cross_attention_dim)
    t = torch.rand(1)
    level = logsnr(t, side)
    z, v = noised(x0, eps, level)
    out = model(z, t * 1000 - 1, states, return_dict=False)[0]
    loss = epsilon_loss(out, v, level).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def cost_rows(quick: bool) -> list[dict]:
    """Rows of (a), and (b) with checkpointing; on a GPU of all. The tiny ones with `quick`."""
    if torch.cuda.is_available():
        rate = matrix_rate()
        return [gpu_row(name, rate) for name in (("tiny",) if quick else ("a", "b", "c"))]
    kinds = [("tiny", False), ("tiny-pixel", True)] if quick else [("a", False), ("b", True)]
    # One process each: what the first leaves to the allocator would hide what the second takes.
    context, rows = multiprocessing.get_context("spawn"), []
    for kind in kinds:
        with context.Pool(1) as pool:
            rows.append(pool.apply(cpu_row, kind))
    return rows


def cpu_row(name: str, checkpointing: bool) -> dict:
    """Peak memory and time of one step in float32, batch 1, optimizer state included."""
    torch.set_num_threads(1)
    with PeakMemory() as memory:
        model = variant(name).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), eps=1e-12)
        started = time.perf_counter()
        loss = training_step(model, optimizer)
        seconds = time.perf_counter() - started
    assert torch.isfinite(torch.tensor(loss))
    # Weights, gradients and two moments in float32 are the least that it can be.
    assert memory.mebibytes * 2**20 >= 16 * model.num_parameters()
    return {
        "method": f"step of {name}" + (", checkpointed" if checkpointing else ""),
        "parameters": model.num_parameters(),
        "gibibytes": memory.mebibytes / 1024,
        "seconds": seconds,
    }


def forward_flop(name: str) -> float:
    """Floating-point operations of a forward of one image, counted without computing it."""
    with torch.device("meta"):
        model = UViT(**VARIANTS[name])
        side, width = model.config.sample_size, model.config.cross_attention_dim
        z, states = torch.randn(1, 3, side, side), torch.randn(1, TOKENS, width)
        t = torch.tensor(500.0)
        with FlopCounterMode(display=False) as counter:
            model(z, t, states)
    return counter.get_total_flops()


def matrix_rate(side: int = 8192, repeats: int = 20) -> float:
    """Floating-point operations a second of the card's bf16 matrix product."""
    a, b = torch.randn(2, side, side, device="cuda", dtype=torch.bfloat16)
    return 2 * side**3 / seconds_of(lambda: a @ b, repeats)


def seconds_of(action, repeats: int) -> float:
    """Seconds of one call on the GPU, after three to warm up."""
    for _ in range(3):
        action()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


@dataclass(frozen=True)
class NoisePages:
    """Noise in the place of encoded pages and of their encoder."""

    side: int
    width: int
    has_tokens: bool = True

    def ready(self, end: int) -> None:
        """All of it is there."""

    def shapes(self) -> tuple[int, int, int]:
        """Those of DINOv2's features."""
        return TOKENS, self.width, self.width

    def batch(self, numbers: range, feature: str) -> tuple[Tensor, Tensor]:
        """States and images."""
        n, generator = len(numbers), torch.Generator().manual_seed(numbers.start)
        states = torch.randn(n, TOKENS, self.width, generator=generator)
        return states, torch.rand(n, 3, self.side, self.side, generator=generator) * 2 - 1


class Unsaved(Loop):
    """The trainer without its files but for metrics.jsonl."""

    def save(self) -> None:
        """A checkpoint of (c) has 21 GB."""

    def preview(self) -> None:
        """There are no references to draw after."""


def trainer(name: str, folder: Path) -> Loop:
    """The training of a full-size model as a recipe asks for it, on noise."""
    config = VARIANTS[name]
    pages = NoisePages(config["sample_size"], config["cross_attention_dim"])
    options = SemanticaOptions(variant=name, compile=True)
    task = SemanticaTask(options, pages, pages, pages.side)
    loop = Options(
        steps=WARM + TIMED,
        batch=BATCHES[name],
        precision="bf16",
        log_every=WARM,
        lr=1e-4,
        decay="constant",
        workers=min(12, max((os.cpu_count() or 1) - 2, 0)),
    )
    return Unsaved(task, loop, folder)


def pictures_per_second(loop: Loop) -> float:
    """Speed after the first WARM steps, by what the trainer logs of itself."""
    loop.run()
    rows = [json.loads(row) for row in (loop.folder / "metrics.jsonl").read_text().splitlines()]
    done = [row["step"] * loop.options.batch for row in rows]
    seconds = [n / row["images_per_second"] for n, row in zip(done, rows, strict=True)]
    return (done[-1] - done[0]) / (seconds[-1] - seconds[0])


def gpu_row(name: str, rate: float) -> dict:
    """Images a second and model FLOPs utilisation of training in bf16, compiled.

    Utilisation is three forwards' operations, as for forward and backward, over `rate`.
    """
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        started = time.perf_counter()
        loop = trainer(name, Path(folder))
        speed = pictures_per_second(loop)
        seconds = time.perf_counter() - started
    return {
        "method": f"training {name}",
        "batch": BATCHES[name],
        "gibibytes": memory.mebibytes / 1024,
        "images_per_second": speed,
        "utilisation": 3 * forward_flop(name) * speed / rate,
        "matrix_tflops": rate / 1e12,
        "seconds_in_all": seconds,
    }
