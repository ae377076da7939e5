"""A plan of blocks: throughput of two processes against one, and what a plan costs over a run.

    python benchmarks/scale.py            20 blocks of 8 images, 20 steps
    python benchmarks/scale.py --quick    8 blocks of 4 images, 5 steps

Every process has one thread and is timed from when its model is loaded. Rounds alternate, and the
median of the rounds counts. Time on the CPU beside the wall's, as other programs disturb the
latter: where two processes have a core each, they draw twice as much at the same CPU time an image.
"""

import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from guidekit.cli.plan import make_plan
from guidekit.cli.scale.block_plan import BlockPlan
from guidekit.cli.scale.drawer import Drawer
from guidekit.cli.scale.store import Store
from guidekit.cli.scale.worker import Worker
from guidekit.cli.session import Session
from guidekit.cli.settings import make_settings
from measured import Results

FORK = multiprocessing.get_context("fork")  # nothing is computed before
PROMPT = "a red circle and a blue square on a white background"
PLACES = (("red circle", [0, 0, 0.5, 1]), ("blue square", [0.5, 0, 1, 1]))
SEGMENTS = [{"phrase": phrase, "box": box} for phrase, box in PLACES]


def plan_of(model: str, blocks: int, block: int, steps: int, seed: int) -> BlockPlan:
    sample = {"model": model, "prompt": PROMPT, "steps": steps, "seeds": [seed]}
    return BlockPlan(
        sample=sample, plugin={"zest": {}}, segment=SEGMENTS, count=blocks * block, block=block
    )


def part(plan: BlockPlan, folder: Path, barrier, found) -> None:
    """One process: what is free of the plan; its seconds on the wall and on the CPU."""
    store = Store.make(folder, plan)
    worker = Worker(store, Drawer(store))
    worker.drawer.draw(0)  # warm
    barrier.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    worker.run()
    found.put((time.perf_counter() - wall, time.process_time() - cpu, worker.drawn))


def run_of(plan: BlockPlan, folder: Path, barrier, found) -> None:
    """The same images as one run of `guidekit sample --no-compare`, in batches of a block."""
    torch.set_num_threads(plan.threads)
    sample = plan.sample | {
        "seeds": range(plan.first, plan.first + plan.count),
        "batch": plan.block,
        "compare": False,
        "out": folder,
    }
    tables = {"sample": sample, "plugin": plan.plugin, "segment": plan.segment}
    settings = make_settings(tables | {"record": {"calls": {"*": plan.calls}}}, {})
    session = Session(make_plan(settings))
    barrier.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    session.draw(lambda done, total: None)
    found.put((time.perf_counter() - wall, time.process_time() - cpu, plan.count))


def measured(target, plan: BlockPlan, processes: int) -> dict[str, float]:
    """Images a second of all processes together, and CPU seconds an image."""
    folder = Path(tempfile.mkdtemp()) / "set"
    barrier, found = FORK.Barrier(processes), FORK.Queue()
    parts = [
        FORK.Process(target=target, args=(plan, folder, barrier, found)) for _ in range(processes)
    ]
    for process in parts:
        process.start()
    rows = [found.get() for _ in parts]
    for process in parts:
        process.join()
    shutil.rmtree(folder.parent)
    walls, cpus, drawn = zip(*rows, strict=True)
    return {"images/s": sum(drawn) / max(walls), "CPU s/image": sum(cpus) / sum(drawn)}


ROWS = {
    "a run": (run_of, 1),
    "a plan, one process": (part, 1),
    "a plan, two processes": (part, 2),
}


@click.command()
@click.option("--model", default="scenes", show_default=True, help="A pipeline of captions.")
@click.option("--blocks", default=0, help="Blocks of the plan; 20.")
@click.option("--block", default=0, help="Images of a block; 8.")
@click.option("--steps", default=0, help="Sampling steps; 20.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the first image.")
@click.option("--quick", is_flag=True, help="8 blocks of 4 images, 5 steps.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
def main(model, blocks, block, steps, rounds, seed, quick, json_file):
    """Prints throughput and CPU time of a run, and of a plan by one and by two processes."""
    defaults = (8, 4, 5) if quick else (20, 8, 20)
    given = zip((blocks, block, steps), defaults, strict=True)
    blocks, block, steps = (value or own for value, own in given)
    plan = plan_of(model, blocks, block, steps, seed)
    found = {name: [] for name in ROWS}
    for _ in range(rounds):
        for name, (target, processes) in ROWS.items():
            found[name].append(measured(target, plan, processes))
    rows = [
        {"method": name} | {key: statistics.median(r[key] for r in values) for key in values[0]}
        for name, values in found.items()
    ]
    print("| | images/s | CPU s/image |\n|---|---|---|")
    for row in rows:
        print(f"| {row['method']} | {row['images/s']:.3f} | {row['CPU s/image']:.4f} |")
    run, one, two = rows
    facts = {
        "two processes over one, wall": two["images/s"] / one["images/s"],
        "two processes over one, by CPU time": 2 * one["CPU s/image"] / two["CPU s/image"],
        "cost of a plan over a run, by CPU time": one["CPU s/image"] / run["CPU s/image"] - 1,
        "cost of a plan over a run, wall": run["images/s"] / one["images/s"] - 1,
    }
    print(
        f"\n{rounds} rounds, {blocks} blocks of {block}, {steps} steps, zest, seed {seed}, a thread"
        f" each on {os.cpu_count()} {platform.machine()} cores (load {os.getloadavg()[0]:.1f}),"
        f" torch {torch.__version__}"
    )
    about = {"n": blocks * block, "batch": block, "steps": steps, "seed": seed, "model": model}
    results = Results(json_file, **about, rounds=rounds, load=os.getloadavg()[0])
    results.extend(rows)
    results.say(*(f"{name}: {value:.3f}" for name, value in facts.items()))
    results.finish()


if __name__ == "__main__":
    main()
