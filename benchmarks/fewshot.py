"""A condition from a handful of labels: prints the tables of few-shot guidance.

    python benchmarks/fewshot.py                      all tables; hours on two cores
    python benchmarks/fewshot.py --part digits        one of them
    python benchmarks/fewshot.py --quick              minutes

The judges never guided and saw none of the shots. Finished cells lie in --cells, so that a stopped
run goes on; intervals are 95%, draws of the shots and their images resampled. One thread.
"""

import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click
import torch

from fewshot_digits import (
    METHODS,
    NAMES,
    SWEEP,
    Digits,
    at_equal_diversity,
    augmented_rows,
    load_judge,
)
from fewshot_scenes import Scenes
from fewshot_store import Store, table
from guidekit import Condition, Denoiser, Sampling, load
from guidekit.heads import Examples, FitOptions, fit
from guidekit.options import option_kinds
from guidekit.worlds import digits
from guidekit.zoo.shipped import ZOO, model_defaults
from guidekit_fewshot import Fewshot
from measured import Results

PARTS = ("digits", "scenes", "latents", "attribute", "augment", "cost")


@dataclass(frozen=True)
class Setting:
    """What all parts share."""

    digits_model: str
    scenes_model: str
    judge: Path
    cells: Path
    n: int  # images a row
    draws: int
    steps: int
    seed: int
    quick: bool


def digit_bench(setting: Setting) -> Digits:
    """The digits with their judge."""
    return Digits(
        setting.digits_model,
        load_judge(setting.judge),
        Store(setting.cells),
        setting.n // setting.draws // 10 * 10,
        setting.draws,
        setting.steps,
        seed=setting.seed,
        **({"code_steps": 20} if setting.quick else {}),
    )


def digit_rows(setting: Setting) -> list[list[dict]]:
    """Ten-way guidance from 10, 20 and 50 labels."""
    bench = digit_bench(setting)
    if setting.quick:
        return [bench.rows((20,), METHODS)]
    tables = [bench.rows((20, 10, 50), METHODS), bench.rows((20,), SWEEP)]
    found = bench.by_draw("ours, detached", 20)
    each = ", ".join(f"{accuracy:.2f}" for accuracy in found)
    rest = sum(found[1:]) / len(found[1:])
    print(f"\nours, detached, 20 labels, by draw: {each}; without the first {rest:.3f}")
    return tables


def augment_rows(setting: Setting) -> list[list[dict]]:
    """A small classifier with generated images."""
    counts, seeds = ((10,), 2) if setting.quick else ((10, 50), 5)
    return [augmented_rows(digit_bench(setting), counts, seeds, 200 if setting.quick else 800)]


def scene_bench(setting: Setting, model: str, **options) -> Scenes:
    """A model of scenes with their judge."""
    return Scenes(
        model,
        Store(setting.cells),
        setting.n // setting.draws,
        setting.draws,
        steps=setting.steps,
        seed=setting.seed,
        **({"code_steps": 4} if setting.quick else {}),
        **options,
    )


def scene_rows(setting: Setting) -> list[list[dict]]:
    """Masks from 20 pairs, and the heads' own segmentation."""
    bench = scene_bench(setting, setting.scenes_model)
    return [bench.mask_rows(), bench.segmentation_rows(20 if setting.quick else 200)]


def latent_rows(setting: Setting) -> list[list[dict]]:
    """Masks from 30 pairs in the latents of `scenes`, without a prompt."""
    bench = scene_bench(setting, "scenes", shots=30, cfg=1.0, scale=800.0)
    return [bench.mask_rows(("unguided", "ours, detached"))]


def red_rows(setting: Setting) -> list[list[dict]]:
    """Has a red object."""
    bench = scene_bench(setting, setting.scenes_model)
    return [bench.attribute_rows(10 if setting.quick else 50)]


def cost_rows(setting: Setting) -> list[list[dict]]:
    """Seconds of a fit on twenty examples, and of a guided step beside an unguided one."""
    denoiser = Denoiser(load(setting.digits_model))
    examples, rows = Examples.of(*digits.shots(2), NAMES), []
    heads = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in {
            "clean": FitOptions(),
            "noised": FitOptions(noised=True),
            "auto": FitOptions(auto=True, budget=20),
        }.items():
            clock, cpu = time.perf_counter(), time.process_time()
            head, _ = fit(denoiser, examples, options)
            rows.append(
                {
                    "fit": f"20 digits, {name}",
                    "s": time.perf_counter() - clock,
                    "s of CPU": time.process_time() - cpu,
                }
            )
            heads[name] = head.save(Path(folder) / name)
        made = {
            form: Fewshot(
                head=heads["noised" if form == "first" else "clean"], label="7", form=form
            )
            for form in get_args(option_kinds(Fewshot)["form"])
        }
        steps = {
            name: step_seconds(denoiser, guidances, 4 if setting.quick else 10)
            for name, guidances in {"unguided": [], **{f: [g] for f, g in made.items()}}.items()
        }
    return [
        rows,
        [
            {
                "step": name,
                "batch": 8,
                "ms of CPU": 1000 * s,
                "over unguided": s / steps["unguided"],
            }
            for name, s in steps.items()
        ],
    ]


def step_seconds(denoiser: Denoiser, guidances: list, repeats: int) -> float:
    """Least CPU seconds of a step, of a few runs."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        Sampling(denoiser, Condition(), guidances, seeds=range(8), steps=repeats).finish()
        best = min(best, (time.process_time() - start) / repeats)
    return best


TABLES = {
    "digits": digit_rows,
    "scenes": scene_rows,
    "latents": latent_rows,
    "attribute": red_rows,
    "augment": augment_rows,
    "cost": cost_rows,
}


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="All by default.")
@click.option("--model", default="digits-ddpm", show_default=True, help="Model of the digits.")
@click.option("--scenes", "scenes_model", default="scenes-ddpm", show_default=True)
@click.option("--judge", type=click.Path(path_type=Path), default=ZOO / "digits-judge")
@click.option("--cells", type=click.Path(path_type=Path), help="Where finished cells are kept.")
@click.option("--n", default=0, help="Images a row; 500.")
@click.option("--draws", default=0, help="Draws of the shots; 5.")
@click.option("--steps", default=0, help="Sampling steps; 50.")
@click.option("--seed", default=0, show_default=True)
@click.option("--quick", is_flag=True, help="20 images a row, one draw, 10 steps.")
@click.option("--json", "json_file", type=click.Path(), help="Also write the rows here.")
def main(parts, model, scenes_model, judge, cells, n, draws, steps, seed, quick, json_file):
    """Prints accuracy, mIoU, rates and costs of guidance by heads fitted on a few labels."""
    torch.set_num_threads(1)
    steps = steps or (10 if quick else model_defaults(model).get("steps", 50))
    cells = cells or Path(tempfile.mkdtemp(prefix="fewshot-"))
    setting = Setting(
        model,
        scenes_model,
        judge,
        cells,
        n or (20 if quick else 500),
        draws or (1 if quick else 5),
        steps,
        seed,
        quick,
    )
    about = {"n": setting.n, "draws": setting.draws, "steps": steps, "seed": seed}
    over = "95% bootstrap intervals"
    if parts == ("augment",):  # whose rows have a number of seeds, and say so
        about, over = {"steps": steps, "seed": seed}, f"{over} over seeds"
    results = Results(json_file, **about, intervals=over)
    for part in parts or PARTS:
        for rows in TABLES[part](setting):
            print(f"\n{table(rows)}", flush=True)
            if rows[0].get("method") == SWEEP[0]:
                results.say(*at_equal_diversity(rows).splitlines())
            name = "scales" if rows[0].get("method") == SWEEP[0] else part
            results.extend({"part": name} | row for row in rows)
    results.finish()
    print(
        f"\nn = {setting.n} a row, {setting.draws} draws of the shots, {steps} steps, seed {seed}, "
        f"one thread on {os.cpu_count()} {platform.machine()} cores, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
