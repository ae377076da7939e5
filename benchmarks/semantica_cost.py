"""What a training step of Semantica's full-size models costs: memory on a CPU, speed on a GPU."""

import multiprocessing
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from guidekit.semantica.model import VARIANTS, UViT, variant
from guidekit.semantica.schedule import epsilon_loss, logsnr, noised

from memory import PeakMemory

TOKENS = 257  # of DINOv2 at 224x224


def training_step(
    model: UViT, optimizer: torch.optim.Optimizer, batch: int, device: str, autocast: bool
) -> float:
    """One step on noise; returns the loss."""
    side = model.config.sample_size
    x0, eps = torch.randn(2, batch, 3, side, side, device=device)
    states = torch.randn(batch, TOKENS, model.config.cross_attention_dim, device=device)
    t = torch.rand(batch, device=device)
    level = logsnr(t, side)
    z, v = noised(x0, eps, level)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = model(z, t * 1000 - 1, states, return_dict=False)[0]
    loss = epsilon_loss(out, v, level).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def cost_rows(quick: bool) -> list[dict]:
    """Rows of (a), and (b) and (c) with checkpointing; the tiny ones with `quick`."""
    if torch.cuda.is_available():
        names = ("tiny",) if quick else ("a", "b", "c")
        rate = matrix_rate()
        return [gpu_row(name, 4 if quick else 32, rate) for name in names]
    kinds = [("tiny", False), ("tiny-pixel", True)] if quick else [("a", False), ("b", True)]
    # One process each: what the first leaves to the allocator would hide what the second takes.
    context, rows = multiprocessing.get_context("spawn"), []
    for kind in kinds:
        with context.Pool(1) as pool:
            rows.append(pool.apply(cpu_row, kind))
    return rows


def _made(name: str, checkpointing: bool, device: str) -> tuple[UViT, torch.optim.Optimizer]:
    model = variant(name).to(device).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    fused = device == "cuda"
    return model, torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.99), eps=1e-12, weight_decay=0, fused=fused
    )


def cpu_row(name: str, checkpointing: bool) -> dict:
    """Peak memory and time of one step in float32, batch 1, optimizer state included."""
    torch.set_num_threads(1)
    with PeakMemory() as memory:
        model, optimizer = _made(name, checkpointing, "cpu")
        started = time.perf_counter()
        loss = training_step(model, optimizer, 1, "cpu", autocast=False)
        seconds = time.perf_counter() - started
    assert torch.isfinite(torch.tensor(loss))
    # Weights, gradients and two moments in float32 are the least that it can be.
    assert memory.mebibytes * 2**20 >= 16 * model.num_parameters()
    return {
        "method": f"step of {name}" + (", checkpointed" if checkpointing else ""),
        "parameters": model.num_parameters(), "gibibytes": memory.mebibytes / 1024,
        "seconds": seconds,
    }  # fmt: skip


def forward_flop(name: str) -> float:
    """Floating-point operations of a forward of one picture, counted without computing it."""
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


def gpu_row(name: str, batch: int, rate: float) -> dict:
    """Pictures a second and model FLOPs utilisation of training in bf16, compiled."""
    model, optimizer = _made(name, name != "a", "cuda")
    model.compile()
    with PeakMemory() as memory:
        seconds = seconds_of(lambda: training_step(model, optimizer, batch, "cuda", True), 10)
    speed = batch / seconds
    return {
        "method": f"training {name}", "batch": batch, "gibibytes": memory.mebibytes / 1024,
        "images_per_second": speed, "utilisation": 3 * forward_flop(name) * speed / rate,
    }  # fmt: skip
